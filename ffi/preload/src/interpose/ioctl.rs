//! `ioctl`: the verbs, and VFIO.

use std::os::fd::RawFd;

use libc::{c_int, c_long, c_ulong, c_void};

use super::{Opened, add, fail, opened};
use crate::errno::Errno;
use crate::faults;

/// `_IOWR(0x1b, 1, struct ib_uverbs_ioctl_hdr)`. SPEC: rdma_user_ioctl_cmds.h.
const RDMA_VERBS_IOCTL: c_ulong = 0xc018_1b01;

/// In place of libc's `ioctl`.
///
/// # Safety
/// As for `ioctl(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: RawFd, request: c_ulong, argument: *mut c_void) -> c_int {
    if let Some(what) = opened(fd) {
        let addr = argument.expose_provenance() as u64;
        // SAFETY: the program vouches for the argument of its ioctl.
        return unsafe { answer(&what, request, addr) }.unwrap_or_else(fail);
    }
    // SAFETY: the system call that the caller asked for, with its arguments.
    let result: c_long = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
    // CAST: `ioctl` returns an int.
    result as c_int
}

/// # Safety
/// The program vouches for the argument.
unsafe fn answer(what: &Opened, request: c_ulong, argument: u64) -> Result<c_int, Errno> {
    match what {
        Opened::Verbs(context) if request == RDMA_VERBS_IOCTL => {
            faults::strike()?;
            // SAFETY: the caller's contract.
            unsafe { context.ioctl(argument) }.map(|()| 0)
        }
        Opened::Verbs(_) => Err(Errno(libc::ENOTTY)),
        // SAFETY: the caller's contract.
        Opened::Container(container) => unsafe { container.ioctl(request, argument) },
        // SAFETY: the caller's contract.
        Opened::Function(function) => unsafe { function.ioctl(request, argument) },
        Opened::Group(group) => {
            let container_of = |fd| match opened(fd) {
                Some(Opened::Container(container)) => Some(container),
                _ => None,
            };
            let take_in = |fd, function| add(fd, Opened::Function(function));
            // SAFETY: the caller's contract.
            unsafe { group.ioctl(request, argument, container_of, take_in) }
        }
    }
}
