//! Command opcodes and status codes.

use std::fmt;

use super::{cmd_in, cmd_out, try_get};
use crate::types::QpTransition;

/// Declares a command enum with codes, manual names and the shortest mailboxes.
macro_rules! ops {
    ($($variant:ident = $code:literal $name:literal in $input:literal out $output:literal,)*) => {
        /// A command that this crate knows.
        ///
        /// SPEC: mlx5_ifc.h `MLX5_CMD_OP_*`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Op {
            $(#[doc = concat!("`", $name, "`.")] $variant = $code,)*
        }

        impl Op {
            /// Every command.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The command with this opcode.
            ///
            /// # Errors
            /// [`UnknownOp`]; a device answers with [`Status::BadOp`].
            pub const fn from_code(code: u16) -> Result<Self, UnknownOp> {
                match code {
                    $($code => Ok(Self::$variant),)*
                    _ => Err(UnknownOp(code)),
                }
            }

            /// The manual's name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Bytes that the command has at least; a device answers a shorter one with
            /// [`Status::BadInpLen`].
            #[must_use]
            pub const fn input_len_min(self) -> usize {
                match self {
                    $(Self::$variant => $input,)*
                }
            }

            /// Bytes that the reply has at least; a device answers with [`Status::BadOutpLen`] if
            /// there is no room for them.
            #[must_use]
            pub const fn output_len_min(self) -> usize {
                match self {
                    $(Self::$variant => $output,)*
                }
            }
        }
    };
}

// The shortest mailboxes are what drivers are seen to send: ENABLE_HCA has a reply of 12 bytes and
// INIT_HCA a body of 16 in libmlx5, and a capability query may ask for any part of its group.
ops! {
    QueryHcaCap = 0x100 "QUERY_HCA_CAP" in 16 out 16,
    InitHca = 0x102 "INIT_HCA" in 16 out 8,
    TeardownHca = 0x103 "TEARDOWN_HCA" in 16 out 8,
    EnableHca = 0x104 "ENABLE_HCA" in 16 out 8,
    DisableHca = 0x105 "DISABLE_HCA" in 16 out 8,
    QueryPages = 0x107 "QUERY_PAGES" in 16 out 16,
    ManagePages = 0x108 "MANAGE_PAGES" in 16 out 16,
    SetHcaCap = 0x109 "SET_HCA_CAP" in 16 out 8,
    QueryIssi = 0x10a "QUERY_ISSI" in 16 out 112,
    SetIssi = 0x10b "SET_ISSI" in 16 out 8,
    CreateMkey = 0x200 "CREATE_MKEY" in 272 out 16,
    DestroyMkey = 0x202 "DESTROY_MKEY" in 16 out 8,
    CreateEq = 0x301 "CREATE_EQ" in 272 out 16,
    DestroyEq = 0x302 "DESTROY_EQ" in 16 out 8,
    QueryEq = 0x303 "QUERY_EQ" in 16 out 272,
    CreateCq = 0x400 "CREATE_CQ" in 272 out 16,
    DestroyCq = 0x401 "DESTROY_CQ" in 16 out 8,
    CreateQp = 0x500 "CREATE_QP" in 272 out 16,
    DestroyQp = 0x501 "DESTROY_QP" in 16 out 8,
    Rst2InitQp = 0x502 "RST2INIT_QP" in 272 out 8,
    Init2RtrQp = 0x503 "INIT2RTR_QP" in 272 out 8,
    Rtr2RtsQp = 0x504 "RTR2RTS_QP" in 272 out 8,
    Rts2RtsQp = 0x505 "RTS2RTS_QP" in 272 out 8,
    SqErr2RtsQp = 0x506 "SQERR2RTS_QP" in 272 out 8,
    ToErrQp = 0x507 "2ERR_QP" in 16 out 8,
    ToRstQp = 0x50a "2RST_QP" in 16 out 8,
    QueryQp = 0x50b "QUERY_QP" in 16 out 256,
    SqdRtsQp = 0x50c "SQD_RTS_QP" in 272 out 8,
    MadIfc = 0x50d "MAD_IFC" in 272 out 272,
    Init2InitQp = 0x50e "INIT2INIT_QP" in 272 out 8,
    QueryRoceAddress = 0x760 "QUERY_ROCE_ADDRESS" in 16 out 48,
    QueryHcaVportContext = 0x762 "QUERY_HCA_VPORT_CONTEXT" in 16 out 528,
    AllocPd = 0x800 "ALLOC_PD" in 16 out 16,
    DeallocPd = 0x801 "DEALLOC_PD" in 16 out 8,
    AllocUar = 0x802 "ALLOC_UAR" in 16 out 16,
    DeallocUar = 0x803 "DEALLOC_UAR" in 16 out 8,
    AccessReg = 0x805 "ACCESS_REG" in 16 out 16,
    CreateRmp = 0x90c "CREATE_RMP" in 272 out 16,
    CreateUmem = 0xa08 "CREATE_UMEM" in 48 out 16,
    DestroyUmem = 0xa0a "DESTROY_UMEM" in 16 out 8,
}

impl Op {
    /// The opcode.
    #[must_use]
    pub const fn code(self) -> u16 {
        // CAST: a fieldless enum of representation u16.
        self as u16
    }

    /// The state transition that the command asks for, if it modifies a queue pair's state.
    #[must_use]
    pub const fn transition(self) -> Option<QpTransition> {
        Some(match self {
            Self::Rst2InitQp => QpTransition::Rst2Init,
            Self::Init2InitQp => QpTransition::Init2Init,
            Self::Init2RtrQp => QpTransition::Init2Rtr,
            Self::Rtr2RtsQp => QpTransition::Rtr2Rts,
            Self::Rts2RtsQp => QpTransition::Rts2Rts,
            Self::SqErr2RtsQp => QpTransition::SqErr2Rts,
            Self::SqdRtsQp => QpTransition::Sqd2Rts,
            Self::ToErrQp => QpTransition::ToErr,
            Self::ToRstQp => QpTransition::ToReset,
            _ => return None,
        })
    }

    /// The command that asks for a state transition.
    #[must_use]
    pub const fn of_transition(transition: QpTransition) -> Self {
        match transition {
            QpTransition::Rst2Init => Self::Rst2InitQp,
            QpTransition::Init2Init => Self::Init2InitQp,
            QpTransition::Init2Rtr => Self::Init2RtrQp,
            QpTransition::Rtr2Rts => Self::Rtr2RtsQp,
            QpTransition::Rts2Rts => Self::Rts2RtsQp,
            QpTransition::SqErr2Rts => Self::SqErr2RtsQp,
            QpTransition::Sqd2Rts => Self::SqdRtsQp,
            QpTransition::ToErr => Self::ToErrQp,
            QpTransition::ToReset => Self::ToRstQp,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// An opcode that names no command this crate knows; 0 also stands for a missing one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("command opcode {0:#06x} is unknown")]
pub struct UnknownOp(pub u16);

/// The command that an input mailbox holds.
///
/// # Errors
/// [`UnknownOp`] if the opcode is unknown or the mailbox too short to hold one.
pub fn op_of(input: &[u8]) -> Result<Op, UnknownOp> {
    // CAST: a 16-bit field.
    Op::from_code(try_get(input, cmd_in::OPCODE).unwrap_or(0) as u16)
}

/// Declares the status enum with codes and manual names.
macro_rules! statuses {
    ($($variant:ident = $code:literal $name:literal errno $errno:literal $doc:literal,)*) => {
        /// How a command ended.
        ///
        /// SPEC: mlx5 `MLX5_CMD_STAT_*`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Status {
            $(#[doc = $doc] $variant = $code,)*
        }

        impl Status {
            /// Every status.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The status with this code.
            ///
            /// # Errors
            /// [`UnknownStatus`].
            pub const fn from_code(code: u8) -> Result<Self, UnknownStatus> {
                match code {
                    $($code => Ok(Self::$variant),)*
                    _ => Err(UnknownStatus(code)),
                }
            }

            /// The manual's name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// The error number that the Linux driver turns the status into, 0 for success.
            #[must_use]
            pub const fn errno(self) -> i32 {
                match self {
                    $(Self::$variant => $errno,)*
                }
            }
        }
    };
}

// Error numbers of Linux: EIO 5, EAGAIN 11, ENOMEM 12, EBUSY 16, EINVAL 22.
statuses! {
    Ok = 0x00 "OK" errno 0 "Carried out.",
    IntErr = 0x01 "INT_ERR" errno 5 "Internal error.",
    BadOp = 0x02 "BAD_OP" errno 22 "Unknown opcode or modifier.",
    BadParam = 0x03 "BAD_PARAM" errno 22 "A parameter is out of range.",
    BadSysState = 0x04 "BAD_SYS_STATE" errno 5 "The device is not in a state for it.",
    BadRes = 0x05 "BAD_RES" errno 22 "The object does not exist or is of another kind.",
    ResBusy = 0x06 "RES_BUSY" errno 16 "The object is in use.",
    Lim = 0x08 "LIM" errno 12 "A limit is exceeded.",
    BadResState = 0x09 "BAD_RES_STATE" errno 22 "The object is not in a state for it.",
    Ix = 0x0a "IX" errno 22 "The index is out of range.",
    NoRes = 0x0f "NO_RES" errno 11 "The device has no more of it.",
    BadQpState = 0x10 "BAD_QP_STATE" errno 22 "The queue pair is not in a state for it.",
    BadPkt = 0x30 "BAD_PKT" errno 22 "A management packet is wrong.",
    BadSizeOutsCqes = 0x40 "BAD_SIZE_OUTS_CQES" errno 22
        "The new size does not hold the outstanding completions.",
    BadInpLen = 0x50 "BAD_INP_LEN" errno 5 "The input mailbox is too short.",
    BadOutpLen = 0x51 "BAD_OUTP_LEN" errno 5 "The output mailbox is too short.",
}

impl Status {
    /// The code.
    #[must_use]
    pub const fn code(self) -> u8 {
        // CAST: a fieldless enum of representation u8.
        self as u8
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x} {}", self.code(), self.name())
    }
}

/// A status code that means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("command status {0:#04x} is unknown")]
pub struct UnknownStatus(pub u8);

/// The status and syndrome that an output mailbox holds; an empty one counts as success.
///
/// # Errors
/// [`UnknownStatus`] if the status code means nothing.
pub fn status_of(output: &[u8]) -> Result<(Status, u32), UnknownStatus> {
    // CAST: fields of 8 and 32 bits.
    let status = try_get(output, cmd_out::STATUS).unwrap_or(0) as u8;
    let syndrome = try_get(output, cmd_out::SYNDROME).unwrap_or(0) as u32;
    Ok((Status::from_code(status)?, syndrome))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip_and_others_are_unknown() {
        for &op in Op::ALL {
            assert_eq!(Op::from_code(op.code()), Ok(op));
            assert_eq!(op.transition().map(Op::of_transition), op.transition().map(|_| op));
        }
        assert_eq!(Op::from_code(0), Err(UnknownOp(0)));
        for &status in Status::ALL {
            assert_eq!(Status::from_code(status.code()), Ok(status));
            assert_eq!(status.errno() == 0, status == Status::Ok);
        }
        assert_eq!(Status::from_code(0x07), Err(UnknownStatus(0x07)));
    }

    #[test]
    fn every_transition_has_a_command() {
        for transition in QpTransition::ALL {
            assert_eq!(Op::of_transition(transition).transition(), Some(transition));
        }
    }

    #[test]
    fn mailboxes_too_short_to_read_are_not_trusted() {
        assert_eq!(op_of(&[5]), Err(UnknownOp(0)));
        assert_eq!(op_of(&[5, 0]), Ok(Op::CreateQp));
        let bad_state = [0x10, 0, 0, 0, 0, 0, 0xab, 0xcd];
        assert_eq!(status_of(&bad_state), Ok((Status::BadQpState, 0xabcd)));
        assert_eq!(status_of(&[0x07]), Err(UnknownStatus(0x07)));
    }
}
