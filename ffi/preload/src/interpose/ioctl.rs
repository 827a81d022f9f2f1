//! `ioctl`: the verbs.

use std::os::fd::RawFd;

use libc::{c_int, c_long, c_ulong, c_void};

use super::{context, fail};

/// `_IOWR(0x1b, 1, struct ib_uverbs_ioctl_hdr)`. SPEC: rdma_user_ioctl_cmds.h.
const RDMA_VERBS_IOCTL: c_ulong = 0xc018_1b01;

/// In place of libc's `ioctl`.
///
/// # Safety
/// As for `ioctl(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: RawFd, request: c_ulong, argument: *mut c_void) -> c_int {
    if let Some(context) = context(fd) {
        if request != RDMA_VERBS_IOCTL {
            return fail(crate::errno::Errno(libc::ENOTTY));
        }
        let addr = argument.expose_provenance() as u64;
        // SAFETY: the program vouches for the argument of its ioctl.
        return match unsafe { context.ioctl(addr) } {
            Ok(()) => 0,
            Err(error) => fail(error),
        };
    }
    // SAFETY: the system call that the caller asked for, with its arguments.
    let result: c_long = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
    // CAST: `ioctl` returns an int.
    result as c_int
}
