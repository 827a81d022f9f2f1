//! `mmap` and `munmap`: doorbell pages.
//!
//! A mapping of an open verbs device is the device's own page, at its own address; it is never unmapped, so that a late
//! doorbell is harmless.

use std::os::fd::RawFd;

use libc::{c_int, c_void, off_t, size_t};

use super::{Opened, fail, opened};
use crate::errno::Errno;
use crate::faults;
use crate::world;

/// In place of libc's `mmap`.
///
/// # Safety
/// As for `mmap(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn mmap(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: RawFd,
    offset: off_t,
) -> *mut c_void {
    let Some(Opened::Verbs(context)) = opened(fd) else {
        // SAFETY: the system call that the caller asked for, with its arguments.
        let mapped = unsafe { libc::syscall(libc::SYS_mmap, addr, len, prot, flags, fd, offset) };
        // CAST: an address, or MAP_FAILED.
        return std::ptr::with_exposed_provenance_mut(mapped as usize);
    };
    let page = faults::strike().and_then(|()| context.page_at(offset.cast_unsigned()).ok_or(Errno::INVAL));
    match page {
        // CAST: an address of this process.
        Ok(page) => std::ptr::with_exposed_provenance_mut(page as usize),
        Err(errno) => {
            fail(errno);
            libc::MAP_FAILED
        }
    }
}

/// In place of libc's `munmap`.
///
/// # Safety
/// As for `munmap(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn munmap(addr: *mut c_void, len: size_t) -> c_int {
    if world::is_page(addr.addr() as u64) {
        return 0;
    }
    // SAFETY: the system call that the caller asked for, with its arguments.
    let result = unsafe { libc::syscall(libc::SYS_munmap, addr, len) };
    // CAST: `munmap` returns an int.
    result as c_int
}
