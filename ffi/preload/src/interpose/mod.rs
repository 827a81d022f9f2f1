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

mod files;
mod ioctl;
mod memory;
mod net;

/// Open devices, by the descriptor that the program has.
static CONTEXTS: LazyLock<RwLock<HashMap<RawFd, Arc<Context>>>> = LazyLock::new(RwLock::default);
/// How many there are, so that programs which have none pay nothing.
static NUM_CONTEXTS: AtomicUsize = AtomicUsize::new(0);

/// The open device behind a descriptor.
fn context(fd: RawFd) -> Option<Arc<Context>> {
    if NUM_CONTEXTS.load(Ordering::Acquire) == 0 {
        return None;
    }
    CONTEXTS.read().get(&fd).cloned()
}

/// All open devices.
fn contexts() -> Vec<Arc<Context>> {
    if NUM_CONTEXTS.load(Ordering::Acquire) == 0 {
        return Vec::new();
    }
    CONTEXTS.read().values().cloned().collect()
}

fn add_context(fd: RawFd, context: Context) {
    CONTEXTS.write().insert(fd, Arc::new(context));
    NUM_CONTEXTS.fetch_add(1, Ordering::AcqRel);
}

fn remove_context(fd: RawFd) -> Option<Arc<Context>> {
    let removed = CONTEXTS.write().remove(&fd)?;
    NUM_CONTEXTS.fetch_sub(1, Ordering::AcqRel);
    Some(removed)
}

/// Reports a refusal as libc does.
fn fail(error: Errno) -> libc::c_int {
    // SAFETY: the address of this thread's own `errno`.
    unsafe { *libc::__errno_location() = error.0 };
    -1
}
