//! Refusals, as the kernel words them.

use ibex_hca::control_region::ControlError;
use ibex_hca::{CommandError, HcaError};

/// An error number of Linux.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("errno {0}")]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    pub(crate) const INVAL: Self = Self(libc::EINVAL);
    pub(crate) const FAULT: Self = Self(libc::EFAULT);
    pub(crate) const NOMEM: Self = Self(libc::ENOMEM);
    pub(crate) const NOENT: Self = Self(libc::ENOENT);
    /// The device has no such thing.
    pub(crate) const NOTSUPP: Self = Self(libc::EOPNOTSUPP);
    /// The kernel knows no such method; libibverbs then tries an older one.
    pub(crate) const NO_METHOD: Self = Self(libc::EPROTONOSUPPORT);
    /// A mailbox came back with a status; the caller reads it there.
    pub(crate) const REMOTE_IO: Self = Self(libc::EREMOTEIO);

    /// What the last system call of this thread left.
    pub(crate) fn last() -> Self {
        Self(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<CommandError> for Errno {
    fn from(refusal: CommandError) -> Self {
        Self(refusal.errno)
    }
}

impl From<HcaError> for Errno {
    fn from(error: HcaError) -> Self {
        match error {
            HcaError::Command(refusal) => refusal.into(),
            HcaError::Os { errno, .. } => Self(errno),
            HcaError::Exhausted { .. } => Self::NOMEM,
            HcaError::Unreachable { .. } => Self(libc::EHOSTUNREACH),
            _ => Self::INVAL,
        }
    }
}

impl From<ControlError> for Errno {
    fn from(_: ControlError) -> Self {
        Self::NOMEM
    }
}
