//! What a completion means to a caller: why work failed, and what kind of work it was.

use std::fmt;

use super::CqeOpcode;
use crate::wqe::Opcode;

/// What failed, as byte 0x37 of an error completion says.
///
/// SPEC: mlx5dv.h `MLX5_CQE_SYNDROME_*`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Syndrome(pub u8);

impl Syndrome {
    /// The request's or receive's length is wrong.
    pub const LOCAL_LENGTH: Self = Self(0x01);
    /// The WQE itself is wrong.
    pub const LOCAL_QP_OP: Self = Self(0x02);
    /// A local key does not allow the access.
    pub const LOCAL_PROT: Self = Self(0x04);
    /// The work was flushed because the QP is in error.
    pub const WR_FLUSH: Self = Self(0x05);
    /// A memory window or key operation failed.
    pub const MW_BIND: Self = Self(0x06);
    /// The response was not one to this request.
    pub const BAD_RESP: Self = Self(0x10);
    /// A remote operation tried to access local memory that it may not.
    pub const LOCAL_ACCESS: Self = Self(0x11);
    /// The remote end says the request is invalid.
    pub const REMOTE_INVAL_REQ: Self = Self(0x12);
    /// The remote end says the key does not allow the access.
    pub const REMOTE_ACCESS: Self = Self(0x13);
    /// The remote end could not carry it out.
    pub const REMOTE_OP: Self = Self(0x14);
    /// No answer within all retries.
    pub const TRANSPORT_RETRY_EXC: Self = Self(0x15);
    /// The remote end had no receive posted within all retries.
    pub const RNR_RETRY_EXC: Self = Self(0x16);
    /// The remote end aborted.
    pub const REMOTE_ABORTED: Self = Self(0x22);

    /// Every syndrome that has a name.
    pub const ALL: [Self; 13] = [
        Self::LOCAL_LENGTH,
        Self::LOCAL_QP_OP,
        Self::LOCAL_PROT,
        Self::WR_FLUSH,
        Self::MW_BIND,
        Self::BAD_RESP,
        Self::LOCAL_ACCESS,
        Self::REMOTE_INVAL_REQ,
        Self::REMOTE_ACCESS,
        Self::REMOTE_OP,
        Self::TRANSPORT_RETRY_EXC,
        Self::RNR_RETRY_EXC,
        Self::REMOTE_ABORTED,
    ];

    /// Its name in lower case, as logs show it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LOCAL_LENGTH => "local length error",
            Self::LOCAL_QP_OP => "local qp operation error",
            Self::LOCAL_PROT => "local protection error",
            Self::WR_FLUSH => "work request flushed",
            Self::MW_BIND => "memory window bind error",
            Self::BAD_RESP => "bad response",
            Self::LOCAL_ACCESS => "local access error",
            Self::REMOTE_INVAL_REQ => "remote invalid request",
            Self::REMOTE_ACCESS => "remote access error",
            Self::REMOTE_OP => "remote operation error",
            Self::TRANSPORT_RETRY_EXC => "transport retries exceeded",
            Self::RNR_RETRY_EXC => "receiver-not-ready retries exceeded",
            Self::REMOTE_ABORTED => "remote aborted",
            _ => "unknown syndrome",
        }
    }

    /// The work completion status that libibverbs reports for it.
    #[must_use]
    pub const fn status(self) -> WcStatus {
        match self {
            Self::LOCAL_LENGTH => WcStatus::LocLenErr,
            Self::LOCAL_QP_OP => WcStatus::LocQpOpErr,
            Self::LOCAL_PROT => WcStatus::LocProtErr,
            Self::WR_FLUSH => WcStatus::WrFlushErr,
            Self::MW_BIND => WcStatus::MwBindErr,
            Self::BAD_RESP => WcStatus::BadRespErr,
            Self::LOCAL_ACCESS => WcStatus::LocAccessErr,
            Self::REMOTE_INVAL_REQ => WcStatus::RemInvReqErr,
            Self::REMOTE_ACCESS => WcStatus::RemAccessErr,
            Self::REMOTE_OP => WcStatus::RemOpErr,
            Self::TRANSPORT_RETRY_EXC => WcStatus::RetryExcErr,
            Self::RNR_RETRY_EXC => WcStatus::RnrRetryExcErr,
            Self::REMOTE_ABORTED => WcStatus::RemAbortErr,
            _ => WcStatus::GeneralErr,
        }
    }

    /// The vendor syndrome that hardware pairs with it, where public logs show one.
    #[must_use]
    pub const fn usual_vendor(self) -> Option<VendorSyndrome> {
        Some(match self {
            Self::TRANSPORT_RETRY_EXC => VendorSyndrome::RETRY_EXC,
            Self::REMOTE_ACCESS => VendorSyndrome::REMOTE_ACCESS,
            Self::REMOTE_INVAL_REQ => VendorSyndrome::REMOTE_INVAL_REQ,
            Self::WR_FLUSH => VendorSyndrome::FLUSHED,
            Self::LOCAL_PROT => VendorSyndrome::LOCAL_PROT,
            Self::REMOTE_ABORTED => VendorSyndrome::PAGE_FAULT,
            _ => return None,
        })
    }
}

impl fmt::Debug for Syndrome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Syndrome({self})")
    }
}

impl fmt::Display for Syndrome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x} {}", self.0, self.name())
    }
}

/// Which of the device's checks failed, as byte 0x36 of an error completion says.
///
/// The values are not documented; these are the ones that public hardware logs show.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VendorSyndrome(pub u8);

impl VendorSyndrome {
    /// Nothing more is known.
    pub const NONE: Self = Self(0);
    /// With [`Syndrome::LOCAL_PROT`]: the local key does not cover the range.
    pub const LOCAL_PROT: Self = Self(0x51);
    /// With [`Syndrome::LOCAL_PROT`]: the local key does not exist or lacks the right.
    pub const LOCAL_PROT_KEY: Self = Self(0x52);
    /// The control segment's index is not the one that the device expected.
    pub const WQE_INDEX: Self = Self(0x68);
    /// With [`Syndrome::TRANSPORT_RETRY_EXC`].
    pub const RETRY_EXC: Self = Self(0x81);
    /// With [`Syndrome::REMOTE_ACCESS`].
    pub const REMOTE_ACCESS: Self = Self(0x88);
    /// With [`Syndrome::REMOTE_INVAL_REQ`].
    pub const REMOTE_INVAL_REQ: Self = Self(0x8a);
    /// With [`Syndrome::REMOTE_ABORTED`]: a page fault that could not be resolved.
    pub const PAGE_FAULT: Self = Self(0x93);
    /// With [`Syndrome::WR_FLUSH`].
    pub const FLUSHED: Self = Self(0xf9);
}

impl fmt::Debug for VendorSyndrome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VendorSyndrome({:#04x})", self.0)
    }
}

impl fmt::Display for VendorSyndrome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x}", self.0)
    }
}

/// Work completion status, with the numbers that libibverbs gives.
///
/// SPEC: verbs.h `ibv_wc_status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum WcStatus {
    /// The work succeeded.
    Success = 0,
    /// Local length error.
    LocLenErr = 1,
    /// Local QP operation error.
    LocQpOpErr = 2,
    /// Local protection error.
    LocProtErr = 4,
    /// Work request flushed error.
    WrFlushErr = 5,
    /// Memory window bind error.
    MwBindErr = 6,
    /// Bad response error.
    BadRespErr = 7,
    /// Local access error.
    LocAccessErr = 8,
    /// Remote invalid request error.
    RemInvReqErr = 9,
    /// Remote access error.
    RemAccessErr = 10,
    /// Remote operation error.
    RemOpErr = 11,
    /// Transport retry counter exceeded.
    RetryExcErr = 12,
    /// Receiver-not-ready retry counter exceeded.
    RnrRetryExcErr = 13,
    /// Remote aborted error.
    RemAbortErr = 16,
    /// Anything else.
    GeneralErr = 21,
}

impl WcStatus {
    /// The number that libibverbs gives.
    #[must_use]
    pub const fn code(self) -> u8 {
        // CAST: a fieldless enum of representation u8.
        self as u8
    }

    /// The text that `ibv_wc_status_str` gives in rdma-core 44.
    #[must_use]
    pub const fn description(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::LocLenErr => "local length error",
            Self::LocQpOpErr => "local QP operation error",
            Self::LocProtErr => "local protection error",
            Self::WrFlushErr => "Work Request Flushed Error",
            Self::MwBindErr => "memory management operation error",
            Self::BadRespErr => "bad response error",
            Self::LocAccessErr => "local access error",
            Self::RemInvReqErr => "remote invalid request error",
            Self::RemAccessErr => "remote access error",
            Self::RemOpErr => "remote operation error",
            Self::RetryExcErr => "transport retry counter exceeded",
            Self::RnrRetryExcErr => "RNR retry counter exceeded",
            Self::RemAbortErr => "aborted error",
            Self::GeneralErr => "general error",
        }
    }
}

/// What kind of work a completion is for, with the numbers that libibverbs gives.
///
/// SPEC: verbs.h `ibv_wc_opcode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum WcOpcode {
    /// A send.
    Send = 0,
    /// An RDMA write.
    RdmaWrite = 1,
    /// An RDMA read.
    RdmaRead = 2,
    /// A compare and swap.
    CompSwap = 3,
    /// A fetch and add.
    FetchAdd = 4,
    /// A receive consumed by a send.
    Recv = 128,
    /// A receive consumed by an RDMA write with immediate.
    RecvRdmaWithImm = 129,
}

impl WcOpcode {
    /// The number that libibverbs gives.
    #[must_use]
    pub const fn code(self) -> u8 {
        // CAST: a fieldless enum of representation u8.
        self as u8
    }

    /// What libmlx5 makes of a good completion's opcode and its send WQE's opcode byte.
    ///
    /// `None` for work that has no counterpart there, NOP among it.
    #[must_use]
    pub const fn of(cqe: CqeOpcode, wqe_opcode: u8) -> Option<Self> {
        Some(match (cqe, Opcode::from_byte(wqe_opcode)) {
            (CqeOpcode::RespWriteImm, _) => Self::RecvRdmaWithImm,
            (CqeOpcode::RespSend | CqeOpcode::RespSendImm | CqeOpcode::RespSendInval, _) => Self::Recv,
            (CqeOpcode::Req, Some(wqe)) => match wqe {
                Opcode::RdmaWrite | Opcode::RdmaWriteImm => Self::RdmaWrite,
                Opcode::Send | Opcode::SendImm | Opcode::SendInval => Self::Send,
                Opcode::RdmaRead => Self::RdmaRead,
                Opcode::AtomicCs => Self::CompSwap,
                Opcode::AtomicFa => Self::FetchAdd,
                _ => return None,
            },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_named_syndromes_have_a_verdict_of_their_own() {
        for code in 0..=u8::MAX {
            let syndrome = Syndrome(code);
            let named = Syndrome::ALL.contains(&syndrome);
            assert_eq!(syndrome.status() != WcStatus::GeneralErr, named, "{syndrome}");
            assert_eq!(syndrome.name() != "unknown syndrome", named, "{syndrome}");
        }
    }

    #[test]
    fn a_syndrome_prints_its_number_and_name() {
        assert_eq!(Syndrome::REMOTE_ACCESS.to_string(), "0x13 remote access error");
        assert_eq!(format!("{:?}", Syndrome(0x77)), "Syndrome(0x77 unknown syndrome)");
    }
}
