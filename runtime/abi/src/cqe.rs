//! Completion queue entries: what the HCA writes when work is done or has failed.
//!
//! A completion queue is memory that the driver or a kernel owns; the HCA writes entries of 64
//! bytes into it. This module owns nothing: it builds and reads those bytes.
//!
//! Invariant: the last 4 bytes, [`CompletionWord`], are written with one release store after the
//! other 60; a reader that sees the word with an acquire load sees the whole entry.
//!
//! ```text
//!  2c            30                          38            3c
//! | byte_cnt    | timestamp                 |op| qpn      |wqe_counter|sig|op_own|   good
//! |                 34 |35 |36     |37      |op| qpn      |wqe_counter|sig|op_own|   error
//!                   hw   type vendor syndrome
//! ```

use std::fmt;
use std::mem::{offset_of, size_of};

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::types::QpNum;

mod syndrome;
pub use syndrome::{Syndrome, VendorSyndrome, WcOpcode, WcStatus};

/// Size of a completion queue entry.
pub const CQE: usize = 64;
/// Offset of the [`CompletionWord`] in an entry.
pub const COMPLETION_WORD_OFFSET: usize = 0x3c;

/// What kind of completion an entry is: the upper half of `op_own`.
///
/// SPEC: mlx5dv.h `MLX5_CQE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CqeOpcode {
    /// A send request succeeded.
    Req = 0x0,
    /// A receive was consumed by an RDMA write with immediate.
    RespWriteImm = 0x1,
    /// A receive was consumed by a send.
    RespSend = 0x2,
    /// A receive was consumed by a send with immediate.
    RespSendImm = 0x3,
    /// A receive was consumed by a send that invalidated a key.
    RespSendInval = 0x4,
    /// The queue moved to another buffer.
    Resize = 0x5,
    /// No packet.
    NoPacket = 0x6,
    /// A signature check failed.
    SigErr = 0xc,
    /// A send request failed.
    ReqErr = 0xd,
    /// A receive failed.
    RespErr = 0xe,
    /// The entry has not been written: what a fresh queue is filled with.
    Invalid = 0xf,
}

impl CqeOpcode {
    /// The opcode with this 4-bit code.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0x0 => Self::Req,
            0x1 => Self::RespWriteImm,
            0x2 => Self::RespSend,
            0x3 => Self::RespSendImm,
            0x4 => Self::RespSendInval,
            0x5 => Self::Resize,
            0x6 => Self::NoPacket,
            0xc => Self::SigErr,
            0xd => Self::ReqErr,
            0xe => Self::RespErr,
            0xf => Self::Invalid,
            _ => return None,
        })
    }

    /// The 4-bit code.
    #[must_use]
    pub const fn code(self) -> u8 {
        // CAST: a fieldless enum of representation u8.
        self as u8
    }

    /// Whether the entry is an [`ErrorCqe`].
    #[must_use]
    pub const fn is_error(self) -> bool {
        matches!(self, Self::ReqErr | Self::RespErr)
    }
}

/// The last byte of an entry: opcode, inline-data format, solicited bit, owner bit.
///
/// ```text
///   7     4  3    2   1    0
/// | opcode | format| se |owner|
/// ```
///
/// Hardware sets bit 1 at will; readers look at the opcode and the owner bit only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OpOwn(pub u8);

impl OpOwn {
    /// What a fresh queue is filled with: no opcode, owner bit set.
    pub const FRESH: Self = Self(0xff);

    /// The byte for an opcode and an owner bit.
    #[must_use]
    pub const fn new(opcode: CqeOpcode, owner: bool) -> Self {
        // CAST: a bool.
        Self(opcode.code() << 4 | owner as u8)
    }

    /// The opcode, if it is a known one.
    #[must_use]
    pub const fn opcode(self) -> Option<CqeOpcode> {
        CqeOpcode::from_code(self.0 >> 4)
    }

    /// The owner bit, which changes each time the producer passes the end of the queue.
    #[must_use]
    pub const fn owner(self) -> bool {
        self.0 & 1 != 0
    }

    /// Whether the entry carries data scattered into it (`cs_req`, `cs_res`), in either size.
    #[must_use]
    pub const fn has_inline_scatter(self) -> bool {
        self.0 & 0b1100 != 0
    }
}

/// The owner bit of the entry that a producer counter stands for, in a queue of `1 << log_size`.
#[must_use]
pub const fn owner_bit(counter: u32, log_size: u8) -> bool {
    // A counter of 32 bits never gets past a larger queue's end.
    log_size < u32::BITS as u8 && (counter >> log_size) & 1 != 0
}

/// Bytes 0x3c..0x40 of an entry, which are written and read as one.
///
/// ```text
///  3c                          3e            3f
/// | wqe_counter               | signature   | op_own      |
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CompletionWord {
    /// Index of the first basic block of the WQE that completed, modulo 2^16.
    pub wqe_counter: U16,
    /// Checksum; non-zero on hardware, never validated.
    pub signature: u8,
    /// See [`OpOwn`].
    pub op_own: u8,
}

const _: () = {
    assert!(size_of::<CompletionWord>() == 4);
    assert!(offset_of!(CompletionWord, wqe_counter) == 0);
    assert!(offset_of!(CompletionWord, signature) == 2);
    assert!(offset_of!(CompletionWord, op_own) == 3);
};

impl CompletionWord {
    /// The word that a 4-byte load at [`COMPLETION_WORD_OFFSET`] gave on this machine.
    #[must_use]
    pub fn from_register(value: u32) -> Self {
        zerocopy::transmute!(value)
    }

    /// The value to store with one 4-byte store on this machine.
    #[must_use]
    pub fn to_register(self) -> u32 {
        zerocopy::transmute!(self)
    }

    /// The opcode, owner and format byte.
    #[must_use]
    pub const fn op_own(&self) -> OpOwn {
        OpOwn(self.op_own)
    }
}

/// Bytes 0x3c..0x40 of an entry with these values.
#[must_use]
pub fn completion_word(wqe_counter: u16, signature: u8, op_own: OpOwn) -> [u8; 4] {
    let [hi, lo] = wqe_counter.to_be_bytes();
    [hi, lo, signature, op_own.0]
}

/// A completion queue entry of a request or receive that succeeded.
///
/// ```text
///  00 rsvd  02 wqe_id  04 rsvd                              11 ml_path
///  12 rsvd  16 slid    18 flags_rqpn  1c hds_ip 1d l4 1e vlan
///  20 srqn_uidx   24 imm_inval_pkey   28 app 29 op 2a info  2c byte_cnt
///  30 timestamp   38 sop_drop_qpn     3c wqe_counter 3e signature 3f op_own
/// ```
///
/// SPEC: mlx5dv.h `mlx5_cqe64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Cqe64 {
    /// Reserved.
    pub rsvd0: [u8; 2],
    /// Index of the receive WQE in a shared queue.
    pub wqe_id: U16,
    /// Reserved.
    pub rsvd4: [u8; 13],
    /// Multicast and loopback flags, path bits.
    pub ml_path: u8,
    /// Reserved.
    pub rsvd12: [u8; 4],
    /// Source LID of a datagram.
    pub slid: U16,
    /// Flags and remote queue pair number of a datagram.
    pub flags_rqpn: U32,
    /// Header split and IP header flags.
    pub hds_ip_ext: u8,
    /// Transport header type and checksum flags.
    pub l4_hdr_type_etc: u8,
    /// VLAN tag.
    pub vlan_info: U16,
    /// Shared receive queue number, or the QP's user index where `cqe_version` is 1.
    pub srqn_uidx: U32,
    /// Immediate data, invalidated key or partition key.
    pub imm_inval_pkey: U32,
    /// Application.
    pub app: u8,
    /// Application's operation.
    pub app_op: u8,
    /// Application's information.
    pub app_info: U16,
    /// Bytes received or read.
    pub byte_cnt: U32,
    /// Device clock or real time, depending on the queue's `ts_format`.
    pub timestamp: U64,
    /// Opcode of the send WQE, and queue pair number.
    pub sop_drop_qpn: U32,
    /// What is written last.
    pub word: CompletionWord,
}

/// A completion queue entry of a request or receive that failed.
///
/// ```text
///  00 rsvd                  20 srqn_uidx  24 rsvd
///  34 hw_err_synd 35 hw_synd_type 36 vendor_err_synd 37 syndrome
///  38 s_wqe_opcode_qpn      3c wqe_counter 3e signature 3f op_own
/// ```
///
/// SPEC: mlx5dv.h `mlx5_err_cqe`; bytes 0x34, 0x35 as in rdma-core v65.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ErrorCqe {
    /// Reserved.
    pub rsvd0: [u8; 32],
    /// Shared receive queue number, or the QP's user index where `cqe_version` is 1.
    pub srqn_uidx: U32,
    /// Reserved.
    pub rsvd24: [u8; 16],
    /// Hardware error syndrome.
    pub hw_err_synd: u8,
    /// Hardware syndrome type.
    pub hw_synd_type: u8,
    /// Vendor syndrome: which check failed, see [`VendorSyndrome`].
    pub vendor_err_synd: u8,
    /// Syndrome: what failed, see [`Syndrome`].
    pub syndrome: u8,
    /// Opcode of the send WQE, and queue pair number.
    pub s_wqe_opcode_qpn: U32,
    /// What is written last.
    pub word: CompletionWord,
}

const _: () = {
    assert!(size_of::<Cqe64>() == CQE);
    assert!(offset_of!(Cqe64, wqe_id) == 0x02);
    assert!(offset_of!(Cqe64, ml_path) == 0x11);
    assert!(offset_of!(Cqe64, slid) == 0x16);
    assert!(offset_of!(Cqe64, flags_rqpn) == 0x18);
    assert!(offset_of!(Cqe64, hds_ip_ext) == 0x1c);
    assert!(offset_of!(Cqe64, l4_hdr_type_etc) == 0x1d);
    assert!(offset_of!(Cqe64, vlan_info) == 0x1e);
    assert!(offset_of!(Cqe64, srqn_uidx) == 0x20);
    assert!(offset_of!(Cqe64, imm_inval_pkey) == 0x24);
    assert!(offset_of!(Cqe64, app) == 0x28);
    assert!(offset_of!(Cqe64, app_op) == 0x29);
    assert!(offset_of!(Cqe64, app_info) == 0x2a);
    assert!(offset_of!(Cqe64, byte_cnt) == 0x2c);
    assert!(offset_of!(Cqe64, timestamp) == 0x30);
    assert!(offset_of!(Cqe64, sop_drop_qpn) == 0x38);
    assert!(offset_of!(Cqe64, word) == COMPLETION_WORD_OFFSET);
    assert!(size_of::<ErrorCqe>() == CQE);
    assert!(offset_of!(ErrorCqe, srqn_uidx) == 0x20);
    assert!(offset_of!(ErrorCqe, hw_err_synd) == 0x34);
    assert!(offset_of!(ErrorCqe, hw_synd_type) == 0x35);
    assert!(offset_of!(ErrorCqe, vendor_err_synd) == 0x36);
    assert!(offset_of!(ErrorCqe, syndrome) == 0x37);
    assert!(offset_of!(ErrorCqe, s_wqe_opcode_qpn) == 0x38);
    assert!(offset_of!(ErrorCqe, word) == COMPLETION_WORD_OFFSET);
};

/// Packs a send opcode and a queue pair number as bytes 0x38..0x3c carry them.
fn opcode_qpn(wqe_opcode: u8, qpn: QpNum) -> U32 {
    U32::new(u32::from(wqe_opcode) << 24 | qpn.get())
}

impl Cqe64 {
    /// An entry for queue pair `qpn` whose other fields are zero.
    ///
    /// `wqe_opcode` is the send WQE's opcode byte, 0 in a receive completion.
    #[must_use]
    pub fn new(wqe_opcode: u8, qpn: QpNum, byte_cnt: u32, wqe_counter: u16, op_own: OpOwn) -> Self {
        let mut cqe = Self::new_zeroed();
        cqe.byte_cnt = U32::new(byte_cnt);
        cqe.sop_drop_qpn = opcode_qpn(wqe_opcode, qpn);
        cqe.word = zerocopy::transmute!(completion_word(wqe_counter, 0, op_own));
        cqe
    }

    /// Queue pair number.
    #[must_use]
    pub fn qpn(&self) -> QpNum {
        QpNum::new(self.sop_drop_qpn.get() & 0xff_ffff)
    }

    /// Opcode byte of the send WQE; means nothing in a receive completion.
    #[must_use]
    pub fn wqe_opcode(&self) -> u8 {
        self.sop_drop_qpn.to_bytes()[0]
    }
}

impl ErrorCqe {
    /// An entry for queue pair `qpn` whose other fields are zero.
    #[must_use]
    pub fn new(
        syndrome: Syndrome,
        vendor: VendorSyndrome,
        wqe_opcode: u8,
        qpn: QpNum,
        wqe_counter: u16,
        op_own: OpOwn,
    ) -> Self {
        let mut cqe = Self::new_zeroed();
        cqe.syndrome = syndrome.0;
        cqe.vendor_err_synd = vendor.0;
        cqe.s_wqe_opcode_qpn = opcode_qpn(wqe_opcode, qpn);
        cqe.word = zerocopy::transmute!(completion_word(wqe_counter, 0, op_own));
        cqe
    }

    /// Queue pair number.
    #[must_use]
    pub fn qpn(&self) -> QpNum {
        QpNum::new(self.s_wqe_opcode_qpn.get() & 0xff_ffff)
    }

    /// Opcode byte of the send WQE that failed.
    #[must_use]
    pub fn wqe_opcode(&self) -> u8 {
        self.s_wqe_opcode_qpn.to_bytes()[0]
    }
}

/// What a completion queue entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cqe<'a> {
    /// The entry was never written.
    Invalid,
    /// Work succeeded.
    Good(CqeOpcode, &'a Cqe64),
    /// Work failed.
    Error(CqeOpcode, &'a ErrorCqe),
    /// The opcode means nothing.
    Unknown(u8),
}

impl<'a> Cqe<'a> {
    /// Reads the entry at the start of `bytes`; the caller has checked the owner bit.
    ///
    /// # Errors
    /// The number of bytes given, if they are fewer than [`CQE`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ShortCqe> {
        let len = bytes.len();
        let (good, _) = Cqe64::ref_from_prefix(bytes).map_err(|_| ShortCqe { len })?;
        let (error, _) = ErrorCqe::ref_from_prefix(bytes).map_err(|_| ShortCqe { len })?;
        Ok(match good.word.op_own().opcode() {
            None => Self::Unknown(good.word.op_own >> 4),
            Some(CqeOpcode::Invalid) => Self::Invalid,
            Some(opcode) if opcode.is_error() => Self::Error(opcode, error),
            Some(opcode) => Self::Good(opcode, good),
        })
    }
}

/// A slice too short to hold a completion queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a completion queue entry has 64 bytes, slice has {len}")]
pub struct ShortCqe {
    /// Bytes in the slice.
    pub len: usize,
}

impl fmt::Display for CqeOpcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_bit_changes_each_time_round() {
        let bits: Vec<bool> = (0..8).map(|counter| owner_bit(counter, 1)).collect();
        assert_eq!(bits, [false, false, true, true, false, false, true, true]);
        assert!(owner_bit(0x8000_0000, 31));
        assert!(!owner_bit(u32::MAX, 32));
    }

    #[test]
    fn a_fresh_entry_is_invalid_and_garbage_is_unknown() {
        assert_eq!(Cqe::parse(&[0xff; 64]), Ok(Cqe::Invalid));
        let mut bytes = [0; 64];
        bytes[63] = 0x70;
        assert_eq!(Cqe::parse(&bytes), Ok(Cqe::Unknown(7)));
        assert_eq!(Cqe::parse(&bytes[1..]), Err(ShortCqe { len: 63 }));
    }

    #[test]
    fn bits_that_hardware_sets_at_will_do_not_change_the_opcode() {
        // The last 16 bytes of an error that a public hardware log shows: bit 1 set, signature 0xf6.
        let mut bytes = [0; 64];
        bytes[48..].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0x88, 0x13, 8, 0, 0x62, 0x14, 0, 0, 0xf6, 0xd2]);
        let Cqe::Error(CqeOpcode::ReqErr, cqe) = Cqe::parse(&bytes).unwrap() else {
            panic!("must be a failed request")
        };
        assert_eq!(Syndrome(cqe.syndrome), Syndrome::REMOTE_ACCESS);
        assert_eq!(VendorSyndrome(cqe.vendor_err_synd), VendorSyndrome::REMOTE_ACCESS);
        assert_eq!((cqe.qpn(), cqe.wqe_opcode()), (QpNum::new(0x6214), 8));
        assert!(!cqe.word.op_own().owner());
    }

    #[test]
    fn the_word_is_the_same_read_as_register_or_bytes() {
        let bytes = completion_word(0x1234, 0x56, OpOwn::new(CqeOpcode::ReqErr, true));
        assert_eq!(bytes, [0x12, 0x34, 0x56, 0xd1]);
        let word = CompletionWord::from_register(u32::from_ne_bytes(bytes));
        assert_eq!((word.wqe_counter.get(), word.signature, word.op_own), (0x1234, 0x56, 0xd1));
        assert_eq!(word.to_register().to_ne_bytes(), bytes);
    }

    #[test]
    fn opcode_codes_round_trip() {
        let known: Vec<u8> = (0..16).filter(|&code| CqeOpcode::from_code(code).is_some()).collect();
        assert_eq!(known, [0, 1, 2, 3, 4, 5, 6, 12, 13, 14, 15]);
        for code in known {
            assert_eq!(CqeOpcode::from_code(code).map(CqeOpcode::code), Some(code));
        }
    }
}
