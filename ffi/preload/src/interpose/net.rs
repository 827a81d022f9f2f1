//! `socket`: libibverbs asks the kernel for devices by netlink first, which would hide ours where there are others.

use libc::{c_int, c_long};

use super::fail;
use crate::errno::Errno;

/// SPEC: linux/netlink.h.
const NETLINK_RDMA: c_int = 20;

/// In place of libc's `socket`: there is no RDMA netlink.
///
/// # Safety
/// As for `socket(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    if domain == libc::AF_NETLINK && protocol == NETLINK_RDMA {
        return fail(Errno::NO_METHOD);
    }
    // SAFETY: the system call that the caller asked for, with its arguments.
    let result: c_long = unsafe { libc::syscall(libc::SYS_socket, domain, kind, protocol) };
    // CAST: `socket` returns an int.
    result as c_int
}
