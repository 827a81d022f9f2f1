//! Doorbell records in memory and the 8-byte doorbell register.
//!
//! A record lives in memory that the driver registered and owns; the HCA only reads it. The
//! register lives in a UAR page that the HCA owns; the driver or a kernel only stores to it.
//!
//! Invariant: a record is written after the WQEs it covers and before the doorbell is rung.

use std::mem::{offset_of, size_of};

use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::types::QpNum;
use crate::wqe::num_wqebbs;

/// Doorbell record of a queue pair: how far each queue is filled.
///
/// ```text
///  00            04
/// | rcv         | snd         |   each a counter of WQEs (rcv) or WQEBBs (snd), low 16 bits
/// ```
///
/// SPEC: mlx5dv.h `MLX5_RCV_DBR`, `MLX5_SND_DBR`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DoorbellRecord {
    /// Receive counter: WQEs posted to the receive queue.
    pub rcv: U32,
    /// Send counter: basic blocks posted to the send queue.
    pub snd: U32,
}

/// Doorbell record of a completion queue.
///
/// ```text
///  00            04
/// | set_ci      | arm         |
/// ```
///
/// SPEC: rdma-core providers/mlx5 `MLX5_CQ_SET_CI`, `MLX5_CQ_ARM_DB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CqDoorbellRecord {
    /// Consumer index, low 24 bits.
    pub set_ci: U32,
    /// Arm command and sequence.
    pub arm: U32,
}

const _: () = {
    assert!(size_of::<DoorbellRecord>() == 8);
    assert!(offset_of!(DoorbellRecord, rcv) == 0);
    assert!(offset_of!(DoorbellRecord, snd) == 4);
    assert!(size_of::<CqDoorbellRecord>() == 8);
    assert!(offset_of!(CqDoorbellRecord, set_ci) == 0);
    assert!(offset_of!(CqDoorbellRecord, arm) == 4);
};

impl DoorbellRecord {
    /// Size in bytes; each record has a 64-byte line of its own in our layouts.
    pub const LEN: usize = size_of::<Self>();

    /// A record with these counters; only the low 16 bits of each are stored.
    #[must_use]
    pub fn new(rcv: u16, snd: u16) -> Self {
        Self { rcv: U32::new(u32::from(rcv)), snd: U32::new(u32::from(snd)) }
    }

    /// The send counter, modulo 2^16.
    #[must_use]
    pub fn send_idx(&self) -> u16 {
        low_half(self.snd)
    }

    /// The receive counter, modulo 2^16.
    #[must_use]
    pub fn recv_idx(&self) -> u16 {
        low_half(self.rcv)
    }
}

fn low_half(word: U32) -> u16 {
    let [_, _, hi, lo] = word.to_bytes();
    u16::from_be_bytes([hi, lo])
}

/// Offset of the first doorbell register in a UAR page.
pub const UAR_BLUE_FLAME_OFFSET: usize = 0x800;
/// Size of a UAR page.
pub const UAR_LEN: usize = 4096;

/// What is stored to a send doorbell register: 8 bytes, in memory order.
///
/// ```text
///  00            01            02            03
/// | opmod       | wqe_idx                   | opcode      |
/// | qpn                                     |rsvd|   ds   |
/// ```
///
/// Two forms are in use. libmlx5 stores the first 8 bytes of the last WQE's control segment: the
/// producer index lies behind that WQE. DOCA GPUNetIO stores the producer index itself with opcode
/// and `ds` zero. `ds` is at least 1 in a WQE, so it tells them apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Doorbell(u64);

impl Doorbell {
    /// The doorbell with these bytes, in memory order.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(u64::from_be_bytes(bytes))
    }

    /// The bytes, in memory order.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }

    /// The doorbell that an 8-byte load of the register gave on this machine.
    #[must_use]
    pub const fn from_register(value: u64) -> Self {
        Self::from_bytes(value.to_ne_bytes())
    }

    /// The value to store to the register with one 8-byte store on this machine.
    #[must_use]
    pub const fn to_register(self) -> u64 {
        u64::from_ne_bytes(self.to_bytes())
    }

    /// The DOCA form: the producer index itself.
    #[must_use]
    pub fn of_producer_idx(producer_idx: u16, qpn: QpNum) -> Self {
        Self(u64::from(producer_idx) << 40 | u64::from(qpn.get()) << 8)
    }

    /// Number of the queue pair.
    #[must_use]
    pub const fn qpn(self) -> QpNum {
        // CAST: masked to 24 bits.
        QpNum::new((self.0 >> 8) as u32 & 0xff_ffff)
    }

    /// Index of the first basic block that is *not* yet posted, modulo 2^16.
    #[must_use]
    pub const fn producer_idx(self) -> u16 {
        // CAST: the shift leaves the index in the low 16 bits, the mask 6 bits.
        let (idx, ds) = ((self.0 >> 40) as u16, self.0 as u8 & 0x3f);
        idx.wrapping_add(num_wqebbs(ds))
    }
}

impl std::fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (qpn, producer_idx) = (self.qpn(), self.producer_idx());
        write!(f, "Doorbell({:016x}: qpn {qpn}, producer_idx {producer_idx})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wqe::{CtrlFlags, CtrlSeg, Opcode};

    #[test]
    fn both_forms_give_the_producer_index() {
        // The last of a batch: first 8 bytes of its control segment.
        let last = Doorbell::from_bytes([0, 0, 0x12, 0x12, 0, 1, 0, 4]);
        assert_eq!((last.qpn(), last.producer_idx()), (QpNum::new(0x100), 0x13));
        let two_blocks = Doorbell::from_bytes([0, 0, 5, 8, 0, 1, 0, 5]);
        assert_eq!(two_blocks.producer_idx(), 7);
        let doca = Doorbell::of_producer_idx(0x13, QpNum::new(0x100));
        assert_eq!(doca.to_bytes(), [0, 0, 0x13, 0, 0, 1, 0, 0]);
        assert_eq!((doca.qpn(), doca.producer_idx()), (QpNum::new(0x100), 0x13));
    }

    #[test]
    fn the_producer_index_wraps_at_2_to_the_16() {
        let ctrl = CtrlSeg::new(0, 0xffff, Opcode::RdmaWrite, QpNum::MAX, 3, CtrlFlags::SIGNALED);
        let head: [u8; 8] = ctrl.as_bytes()[..8].try_into().unwrap();
        let doorbell = Doorbell::from_bytes(head);
        assert_eq!((doorbell.qpn(), doorbell.producer_idx()), (QpNum::MAX, 0));
    }

    #[test]
    fn the_register_value_has_the_bytes_in_memory_order() {
        let doorbell = Doorbell::from_bytes([1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(doorbell.to_register().to_ne_bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(Doorbell::from_register(doorbell.to_register()), doorbell);
    }

    #[test]
    fn a_record_keeps_the_low_half_of_its_counters() {
        let record = DoorbellRecord::read_from_bytes(&[0, 1, 0x12, 0x34, 0, 2, 0xff, 0xff]).unwrap();
        assert_eq!((record.recv_idx(), record.send_idx()), (0x1234, 0xffff));
        assert_eq!(DoorbellRecord::new(1, 0x1a).as_bytes(), [0, 0, 0, 1, 0, 0, 0, 0x1a]);
    }
}
