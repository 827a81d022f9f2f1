//! Why a device could not be opened, and what error numbers of the C libraries mean.

use std::io;

use ibex_abi::prm::{self, Op, Status};
use ibex_mlx5dv_sys::LoadError;

use super::devices::errno;
use crate::{CommandError, HcaError};

/// Why no device was opened; nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The libraries are not there.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// No device of that name, or none at all.
    #[error("no mlx5 device{}: this machine has {found:?}; see `ibex doctor`", wanted_name(.wanted))]
    NoDevice {
        /// The name that was asked for.
        wanted: Option<String>,
        /// The names that exist.
        found: Vec<String>,
    },
    /// The device exists and this process may not open it with DevX.
    #[error("{device} cannot be opened with DevX (errno {errno}); see `ibex doctor`")]
    NotOpened {
        /// Which device.
        device: String,
        /// The error number.
        errno: i32,
    },
    /// No port of the device is active, or not the one asked for.
    #[error("{device} has no active port{}; see `ibex doctor`", wanted_port(.wanted))]
    NoPort {
        /// Which device.
        device: String,
        /// The port that was asked for.
        wanted: Option<u8>,
    },
    /// The port's table has no usable entry, or not the one asked for.
    #[error("port {port} of {device} has no usable GID{}; see `ibex doctor`", wanted_gid(.wanted))]
    NoGid {
        /// Which device.
        device: String,
        /// Which port.
        port: u8,
        /// The index that was asked for.
        wanted: Option<u8>,
    },
    /// A call on the opened device failed.
    #[error("{device}: {source}")]
    Device {
        /// Which device.
        device: String,
        /// What failed.
        source: HcaError,
    },
}

fn wanted_name(wanted: &Option<String>) -> String {
    wanted.as_ref().map(|name| format!(" named {name}")).unwrap_or_default()
}

fn wanted_port(wanted: &Option<u8>) -> String {
    wanted.map(|port| format!(" {port}")).unwrap_or_default()
}

fn wanted_gid(wanted: &Option<u8>) -> String {
    wanted.map(|index| format!(" at index {index}")).unwrap_or_default()
}

/// Bytes of status and syndrome, with which every reply begins.
const REPLY_HEADER: usize = 8;

/// A call that failed, as callers of [`crate::Hca`] see it.
pub(super) fn failed(call: &'static str, error: &io::Error) -> HcaError {
    HcaError::Os { call, errno: errno(error) }
}

/// A command that this provider refuses itself, as the device would; the reply says so as well.
pub(super) fn refuse(opcode: u16, status: Status, output: &mut [u8]) -> CommandError {
    output.fill(0);
    if output.len() >= REPLY_HEADER {
        prm::set(output, prm::cmd_out::STATUS, status.code().into());
    }
    CommandError::new(opcode, status, 0, None)
}

/// What the kernel says of a command that failed: the device's own answer where there is one.
///
/// The kernel answers EREMOTEIO where the device refused and the output is the device's; drivers before Linux 5.19
/// translate the status into an error number instead, and leave no output.
pub(super) fn refused(opcode: u16, error: &io::Error, output: &[u8]) -> CommandError {
    let errno = errno(error);
    let (status, syndrome) = match prm::status_of(output) {
        Ok((status, syndrome)) if status != Status::Ok => (status, syndrome),
        _ => (status_of_errno(errno), 0),
    };
    CommandError { errno, ..CommandError::new(opcode, status, syndrome, None) }
}

/// The likeliest status behind an error number.
fn status_of_errno(errno: i32) -> Status {
    match errno {
        libc::EBUSY => Status::ResBusy,
        libc::ENOMEM => Status::Lim,
        libc::EAGAIN => Status::NoRes,
        libc::EINVAL => Status::BadParam,
        libc::EOPNOTSUPP | libc::ENOSYS | libc::EPERM | libc::EACCES => Status::BadOp,
        libc::ENODEV | libc::ENXIO => Status::BadSysState,
        _ => Status::IntErr,
    }
}

/// An object that is in use.
pub(super) fn busy(op: Op) -> HcaError {
    CommandError::new(op.code(), Status::ResBusy, 0, None).into()
}

/// An object that does not exist here.
pub(super) fn unknown(op: Op) -> HcaError {
    CommandError::new(op.code(), Status::BadRes, 0, None).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_devices_own_answer_counts_before_the_error_number() {
        let mut output = [0; 16];
        prm::set(&mut output, prm::cmd_out::STATUS, Status::BadRes.code().into());
        prm::set(&mut output, prm::cmd_out::SYNDROME, 0x4b_b88f);
        let error = refused(Op::Init2RtrQp.code(), &io::Error::from_raw_os_error(libc::EREMOTEIO), &output);
        assert_eq!((error.status, error.syndrome, error.errno), (Status::BadRes, 0x4b_b88f, libc::EREMOTEIO));
        let older = refused(Op::DestroyCq.code(), &io::Error::from_raw_os_error(libc::EBUSY), &[0; 16]);
        assert_eq!((older.status, older.syndrome), (Status::ResBusy, 0));
    }

    #[test]
    fn errors_of_opening_say_what_was_wanted_and_what_is_there() {
        let error = OpenError::NoDevice { wanted: Some("mlx5_7".into()), found: vec!["mlx5_0".into()] };
        let said = error.to_string();
        assert!(
            said.contains("named mlx5_7") && said.contains("mlx5_0\"]") && said.contains("doctor"),
            "{said}"
        );
        let error = OpenError::NoGid { device: "mlx5_0".into(), port: 1, wanted: Some(3) };
        assert!(error.to_string().contains("index 3"), "{error}");
    }
}
