//! Numbers with a meaning: sequence numbers, queue pair numbers, partition keys, packet sizes, timers.
//!
//! Nothing here owns memory. A value that exists fits the field that carries it on the wire.

use std::fmt;

/// Numbers of 24 bits.
const MASK_24: u32 = (1 << 24) - 1;

/// Packet sequence number: 24 bits on a circle, so there is no order, only distance.
///
/// SPEC: IBTA vol. 1 §9.7.1: sequence numbers are compared modulo 2^24.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Psn(u32);

impl Psn {
    /// The sequence number with the low 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & MASK_24)
    }

    /// The number, below 2^24.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The sequence number `packets` later on the circle.
    #[must_use]
    pub const fn plus(self, packets: u32) -> Self {
        Self::new(self.0.wrapping_add(packets))
    }

    /// The sequence number before this one.
    #[must_use]
    pub const fn before(self) -> Self {
        self.plus(MASK_24)
    }

    /// Signed distance from `earlier` to `self` along the shorter way, in [-2^23, 2^23).
    #[must_use]
    pub const fn distance_from(self, earlier: Self) -> i32 {
        let up = self.0.wrapping_sub(earlier.0) & MASK_24;
        // CAST: the shift moves bit 23 to the sign position and back, which sign-extends.
        ((up << 8) as i32) >> 8
    }

    /// Whether `self` lies in the half circle after `other`.
    #[must_use]
    pub const fn is_after(self, other: Self) -> bool {
        self.distance_from(other) > 0
    }

    /// Packets from `earlier` up to `self`, going forward only.
    #[must_use]
    pub const fn packets_since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0) & MASK_24
    }
}

impl fmt::Debug for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Psn({:#08x})", self.0)
    }
}

impl fmt::Display for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#08x}", self.0)
    }
}

/// Queue pair number of 24 bits, as packets name it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct QpNum(u32);

impl QpNum {
    /// The queue pair number with the low 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & MASK_24)
    }

    /// The number, below 2^24.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for QpNum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QpNum({:#x})", self.0)
    }
}

/// Message sequence number: messages that a responder has completed, modulo 2^24.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Msn(u32);

impl Msn {
    /// The number with the low 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & MASK_24)
    }

    /// The number, below 2^24.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number after one more message.
    #[must_use]
    pub const fn next(self) -> Self {
        Self::new(self.0 + 1)
    }
}

/// Partition key: 15 bits of partition and a membership bit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PKey(pub u16);

impl PKey {
    const FULL_MEMBER: u16 = 0x8000;
    /// Full member of the default partition, which RoCE devices use.
    pub const DEFAULT: Self = Self(0xffff);

    /// Whether a packet with `other` may be taken in: one partition, and not two limited members.
    ///
    /// SPEC: IBTA vol. 1 §10.9.3.
    #[must_use]
    pub const fn admits(self, other: Self) -> bool {
        let same = (self.0 ^ other.0) & !Self::FULL_MEMBER == 0;
        let valid = self.0 & !Self::FULL_MEMBER != 0;
        same && valid && (self.0 | other.0) & Self::FULL_MEMBER != 0
    }
}

/// Largest payload of one packet on a path.
///
/// SPEC: IBTA vol. 1 §9.7: path MTU; codes as in `ibv_mtu`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Mtu {
    /// 256 bytes.
    B256 = 1,
    /// 512 bytes.
    B512 = 2,
    /// 1024 bytes.
    B1024 = 3,
    /// 2048 bytes.
    B2048 = 4,
    /// 4096 bytes.
    B4096 = 5,
}

impl Mtu {
    /// Every MTU, smallest first.
    pub const ALL: [Self; 5] = [Self::B256, Self::B512, Self::B1024, Self::B2048, Self::B4096];

    /// Its code in queue pair contexts.
    #[must_use]
    pub const fn code(self) -> u8 {
        // CAST: a discriminant of this enum.
        self as u8
    }

    /// The MTU with this code.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1..=5 => Some(Self::ALL[code as usize - 1]),
            _ => None,
        }
    }

    /// The largest MTU whose packets fit `len` bytes of UDP payload, all headers and the ICRC included.
    #[must_use]
    pub fn fitting(len: usize) -> Option<Self> {
        Self::ALL.into_iter().rev().find(|mtu| mtu.packet_len_max() <= len)
    }

    /// Payload bytes of a full packet.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        128 << self.code()
    }

    /// Longest packet on such a path: BTH, the longest extended headers, payload, ICRC.
    #[must_use]
    pub const fn packet_len_max(self) -> usize {
        crate::wire::HEADERS_LEN_MAX + self.bytes() as usize + crate::wire::ICRC_LEN
    }

    /// Packets of a message of `len` bytes; an empty one is one packet.
    #[must_use]
    pub const fn packets(self, len: u32) -> u32 {
        if len == 0 { 1 } else { len.div_ceil(self.bytes()) }
    }
}

/// A point in time, in nanoseconds since whatever the caller counts from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Nanos(pub u64);

impl Nanos {
    /// The time `nanos` later.
    #[must_use]
    pub const fn plus(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }
}

/// Code of the time after which a packet without answer is sent again: 4.096 us * 2^code.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AckTimeout(u8);

impl AckTimeout {
    /// The timeout with the low 5 bits of `code`; 0 waits for ever.
    #[must_use]
    pub const fn new(code: u8) -> Self {
        Self(code & 31)
    }

    /// The time, unless it is for ever.
    #[must_use]
    pub const fn nanos(self) -> Option<u64> {
        match self.0 {
            0 => None,
            code => Some(4096 << code),
        }
    }
}

/// Code of the time that a responder without a receive asks its requester to wait.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RnrTimer(u8);

impl RnrTimer {
    /// The timer with the low 5 bits of `code`.
    #[must_use]
    pub const fn new(code: u8) -> Self {
        Self(code & 31)
    }

    /// The code, below 32.
    #[must_use]
    pub const fn code(self) -> u8 {
        self.0
    }

    /// The time in nanoseconds.
    ///
    /// SPEC: IBTA vol. 1 table 45: in steps of about the square root of two, 0 being the longest.
    #[must_use]
    pub const fn nanos(self) -> u64 {
        const HUNDREDTHS_OF_MS: [u64; 32] = [
            65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536,
            2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
        ];
        HUNDREDTHS_OF_MS[self.0 as usize] * 10_000
    }
}

/// An address at the remote end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RemoteAddr {
    /// Virtual address.
    pub va: u64,
    /// Key that gives the address its meaning.
    pub rkey: u32,
}

/// A range of bytes at the remote end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RemoteRange {
    /// Where it starts.
    pub addr: RemoteAddr,
    /// Bytes in it.
    pub len: u32,
}

/// An atomic operation on an aligned 8-byte word.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AtomicOp {
    /// Adds, wrapping around.
    FetchAdd {
        /// What is added.
        add: u64,
    },
    /// Stores `swap` if the word equals `compare`.
    CmpSwap {
        /// The new value.
        swap: u64,
        /// The value that the word must have.
        compare: u64,
    },
}

impl AtomicOp {
    /// What the word is after the operation.
    #[must_use]
    pub const fn apply(self, old: u64) -> u64 {
        match self {
            Self::FetchAdd { add } => old.wrapping_add(add),
            Self::CmpSwap { swap, compare } if old == compare => swap,
            Self::CmpSwap { .. } => old,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_numbers_live_on_a_circle() {
        let last = Psn::new(0xff_ffff);
        assert_eq!(last.plus(1), Psn::new(0));
        assert_eq!(Psn::new(0).before(), last);
        assert_eq!(Psn::new(3).distance_from(last), 4);
        assert_eq!(last.distance_from(Psn::new(3)), -4);
        assert_eq!(Psn::new(3).packets_since(last), 4);
        assert_eq!(last.packets_since(Psn::new(3)), 0xff_fffc);
        assert_eq!(Psn::new(1 << 23).distance_from(Psn::new(0)), -(1 << 23));
        assert_eq!(Psn::new((1 << 23) - 1).distance_from(Psn::new(0)), (1 << 23) - 1);
        assert!(Psn::new(0).is_after(last) && !last.is_after(last));
        assert_eq!(Psn::new(0x0100_0005), Psn::new(5));
        assert_eq!(Msn::new(0xff_ffff).next(), Msn::new(0));
    }

    #[test]
    fn a_message_has_as_many_packets_as_its_length_needs() {
        let packets = |len| Mtu::B4096.packets(len);
        assert_eq!([0, 1, 4096, 4097, 8192].map(packets), [1, 1, 1, 2, 2]);
        assert_eq!(Mtu::B256.packets(1 << 30), 1 << 22);
        for mtu in Mtu::ALL {
            assert_eq!(Mtu::from_code(mtu.code()), Some(mtu));
            assert_eq!(Mtu::fitting(mtu.packet_len_max()), Some(mtu));
            assert!(Mtu::fitting(mtu.packet_len_max() - 1) < Some(mtu));
        }
        assert_eq!([0, 6, 255].map(Mtu::from_code), [None; 3]);
        assert_eq!(Mtu::fitting(299), None);
    }

    #[test]
    fn timers_follow_their_codes() {
        assert_eq!(AckTimeout::new(0).nanos(), None);
        assert_eq!(AckTimeout::new(14).nanos(), Some(67_108_864));
        assert_eq!(AckTimeout::new(31).nanos(), Some(4096 << 31));
        assert_eq!(AckTimeout::new(32).nanos(), None);
        let nanos = [0, 1, 12, 31].map(|code| RnrTimer::new(code).nanos());
        assert_eq!(nanos, [655_360_000, 10_000, 640_000, 491_520_000]);
        let codes: Vec<_> = (1..32).map(|code| RnrTimer::new(code).nanos()).collect();
        assert!(codes.is_sorted() && codes[30] < nanos[0]);
    }

    #[test]
    fn partitions_admit_members() {
        let admits = |ours, theirs| PKey(ours).admits(PKey(theirs));
        assert!(admits(0xffff, 0xffff) && admits(0xffff, 0x7fff) && admits(0x7fff, 0xffff));
        assert!(!admits(0x7fff, 0x7fff), "two limited members");
        assert!(!admits(0xffff, 0xfffe) && !admits(0x8001, 0x8002));
        assert!(!admits(0x8000, 0x8000), "the invalid key");
    }
}
