//! Functions of libc that a preloaded library takes the place of, one file per family.
//!
//! Each looks whether its argument is one of ours, which costs a load as long as no device is open, and else does the
//! system call that libc would have done. A call that is answered here returns -1 and sets `errno` as libc would.
//!
//! `open` and `ioctl` are variadic in C. On x86-64 an argument of integer class travels in the same register whether
//! it is named or variadic, so that a definition with the last argument named reads what the caller passed.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use parking_lot::RwLock;

use crate::errno::Errno;
use crate::uverbs::Context;
use crate::vfio::{Container, Group, OpenFunction};

mod files;
mod ioctl;
mod memory;
mod net;

/// What a descriptor of ours stands for.
#[derive(Debug, Clone)]
enum Opened {
    Verbs(Arc<Context>),
    Container(Arc<Container>),
    Group(Arc<Group>),
    Function(Arc<OpenFunction>),
}

/// What is open, by the descriptor that the program has.
static OPENED: LazyLock<RwLock<HashMap<RawFd, Opened>>> = LazyLock::new(RwLock::default);
/// How much there is, so that programs which have nothing open pay nothing.
static NUM_OPENED: AtomicUsize = AtomicUsize::new(0);

/// What stands behind a descriptor, if it is ours.
fn opened(fd: RawFd) -> Option<Opened> {
    if NUM_OPENED.load(Ordering::Acquire) == 0 {
        return None;
    }
    OPENED.read().get(&fd).cloned()
}

/// All open devices.
pub(crate) fn contexts() -> Vec<Arc<Context>> {
    if NUM_OPENED.load(Ordering::Acquire) == 0 {
        return Vec::new();
    }
    let verbs = |opened: &Opened| match opened {
        Opened::Verbs(context) => Some(Arc::clone(context)),
        _ => None,
    };
    OPENED.read().values().filter_map(verbs).collect()
}

fn add(fd: RawFd, what: Opened) {
    OPENED.write().insert(fd, what);
    NUM_OPENED.fetch_add(1, Ordering::AcqRel);
}

fn remove(fd: RawFd) -> Option<Opened> {
    if NUM_OPENED.load(Ordering::Acquire) == 0 {
        return None;
    }
    let removed = OPENED.write().remove(&fd)?;
    NUM_OPENED.fetch_sub(1, Ordering::AcqRel);
    Some(removed)
}

/// Reports a refusal as libc does.
fn fail(error: Errno) -> libc::c_int {
    // SAFETY: the address of this thread's own `errno`.
    unsafe { *libc::__errno_location() = error.0 };
    -1
}
