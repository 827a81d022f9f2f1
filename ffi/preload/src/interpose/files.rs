//! `open`, `stat`, `opendir` and `close`: devices appear, are opened and closed.
//!
//! What `open` of a node gives is a descriptor of `/dev/null`: a character device with a descriptor of its own, which
//! is all that libibverbs looks at besides the ioctls that are answered here.

use std::ffi::{CStr, OsStr};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::{DIR, c_char, c_int, c_long, mode_t};

use super::{add_context, contexts, fail, remove_context};
use crate::errno::Errno;
use crate::settings::Settings;
use crate::uverbs::Context;
use crate::world::{self, Device};

/// Where device nodes are.
const NODES: &str = "/dev/infiniband";
const NULL: &CStr = c"/dev/null";

/// Tells libibverbs where to look, as soon as the library is loaded.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = {
    extern "C" fn at_load() {
        let dir = Settings::from_env().map_or_else(|_| std::env::temp_dir(), |settings| settings.dir);
        // SAFETY: the dynamic linker runs this before the program's first thread can start another.
        unsafe { std::env::set_var("SYSFS_PATH", world::choose_sysfs_root(&dir)) };
    }
    at_load
};

/// A path that a program passed.
///
/// # Safety
/// `path` is null or a string.
unsafe fn path_of<'a>(path: *const c_char) -> Option<&'a Path> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's contract.
    let text = unsafe { CStr::from_ptr(path) };
    Some(Path::new(OsStr::from_bytes(text.to_bytes())))
}

/// The device whose node has this path.
fn device_at(path: &Path) -> Option<&'static Device> {
    if path.parent() != Some(Path::new(NODES)) {
        return None;
    }
    let name = path.file_name()?.to_str()?;
    world::get()?.devices.iter().find(|device| device.node_name() == name)
}

fn opened(fd: c_long) -> RawFd {
    // CAST: descriptors are ints.
    fd as RawFd
}

/// In place of libc's `open`.
///
/// # Safety
/// As for `open(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> RawFd {
    // SAFETY: the caller's contract.
    let device = unsafe { path_of(path) }.and_then(device_at);
    let real = if device.is_some() { NULL.as_ptr() } else { path };
    // SAFETY: the system call that the caller asked for, with its arguments, or with a path of ours.
    let fd = opened(unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, real, flags, mode) });
    if let Some(device) = device.filter(|_| fd >= 0) {
        add_context(fd, Context::open(device));
    }
    fd
}

/// In place of libc's `stat`.
///
/// # Safety
/// As for `stat(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn stat(path: *const c_char, to: *mut libc::stat) -> c_int {
    // SAFETY: the caller's contract.
    let device = unsafe { path_of(path) }.and_then(device_at);
    let real = if device.is_some() { NULL.as_ptr() } else { path };
    // SAFETY: the system call that the caller asked for, with its arguments, or with a path of ours; on x86-64 the
    // structure of libc is that of the kernel.
    let result = unsafe { libc::syscall(libc::SYS_newfstatat, libc::AT_FDCWD, real, to, 0) };
    // CAST: `stat` returns an int.
    result as c_int
}

/// In place of libc's `opendir`: the sysfs tree is made when somebody looks at it.
///
/// # Safety
/// As for `opendir(3)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn opendir(path: *const c_char) -> *mut DIR {
    type OpenDir = unsafe extern "C" fn(*const c_char) -> *mut DIR;
    // SAFETY: the caller's contract.
    if unsafe { path_of(path) }.is_some_and(world::is_in_sysfs) && world::get().is_none() {
        fail(Errno::NOENT);
        return std::ptr::null_mut();
    }
    // SAFETY: looks up a symbol by a name that is a string.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, c"opendir".as_ptr()) };
    if next.is_null() {
        fail(Errno(libc::ENOSYS));
        return std::ptr::null_mut();
    }
    // SAFETY: libc's `opendir` has this type.
    let next = unsafe { std::mem::transmute::<*mut libc::c_void, OpenDir>(next) };
    // SAFETY: the caller's contract.
    unsafe { next(path) }
}

/// In place of libc's `close`: with a device's descriptor its objects end.
///
/// # Safety
/// As for `close(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn close(fd: RawFd) -> c_int {
    match remove_context(fd) {
        Some(context) => context.close(),
        None => contexts().iter().for_each(|context| context.forget_file(fd)),
    }
    // SAFETY: the system call that the caller asked for, with its argument.
    let result = unsafe { libc::syscall(libc::SYS_close, fd) };
    // CAST: `close` returns an int.
    result as c_int
}
