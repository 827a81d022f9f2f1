//! Numbers with a meaning: queue numbers, keys, addresses, sequence numbers, QP states.
//!
//! Nothing here owns memory. A value that exists fits the field that carries it on the wire or in
//! a mailbox: constructors check the width once, so writers downstream need no checks.

use std::fmt;

/// A number was given that does not fit the field that must carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} is {value:#x}, above its limit of {limit:#x}")]
pub struct OutOfRange {
    /// Which number, by its type's name.
    pub what: &'static str,
    /// The value given.
    pub value: u64,
    /// The largest value that fits.
    pub limit: u64,
}

/// What every number here can do: become a `u64`, be printed in hexadecimal.
macro_rules! widens_and_prints {
    ($name:ident) => {
        impl From<$name> for u64 {
            fn from(number: $name) -> u64 {
                u64::from(number.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

/// Declares a newtype over `u32` whose value fits a field of fewer than 32 bits.
macro_rules! narrow {
    ($(#[$doc:meta])* $name:ident, $bits:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(u32);

        impl $name {
            /// Width of the field that carries this number, in bits.
            pub const BITS: u32 = $bits;
            /// The largest value that fits the field.
            pub const MAX: Self = Self((1 << $bits) - 1);

            /// Wraps a number that is known to fit.
            ///
            /// # Panics
            /// PANIC: if `value` is above [`Self::MAX`]; use `try_from` for numbers from outside.
            #[must_use]
            pub const fn new(value: u32) -> Self {
                assert!(value <= Self::MAX.0, concat!(stringify!($name), " does not fit its field"));
                Self(value)
            }

            /// The number itself.
            #[must_use]
            pub const fn get(self) -> u32 {
                self.0
            }
        }

        impl TryFrom<u32> for $name {
            type Error = OutOfRange;

            fn try_from(value: u32) -> Result<Self, OutOfRange> {
                if value <= Self::MAX.0 {
                    return Ok(Self(value));
                }
                Err(OutOfRange {
                    what: stringify!($name),
                    value: u64::from(value),
                    limit: u64::from(Self::MAX.0),
                })
            }
        }

        impl From<$name> for u32 {
            fn from(number: $name) -> u32 {
                number.0
            }
        }

        widens_and_prints!($name);
    };
}

/// Declares a newtype over an integer that may take every value of that integer.
macro_rules! whole {
    ($(#[$doc:meta])* $name:ident, $int:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(pub $int);

        impl $name {
            /// The number itself.
            #[must_use]
            pub const fn get(self) -> $int {
                self.0
            }
        }

        widens_and_prints!($name);
    };
}

narrow!(
    /// Queue pair number: assigned by the HCA, changes when the QP is recreated.
    QpNum, 24
);
narrow!(
    /// Completion queue number.
    CqNum, 24
);
narrow!(
    /// Event queue number.
    Eqn, 8
);
narrow!(
    /// Index of a user access region, the page that holds doorbell registers.
    UarIdx, 24
);
narrow!(
    /// Protection domain number.
    Pd, 24
);
narrow!(
    /// Index of a memory key object; its key is the index and an 8-bit variant, see [`Lkey`].
    MkeyIndex, 24
);
whole!(
    /// Number of memory registered for HCA objects.
    UmemId, u32
);
whole!(
    /// Local handle of a memory key: `mkey_index << 8 | variant`.
    Lkey, u32
);
whole!(
    /// Remote handle of a memory key: the same number as its [`Lkey`] on mlx5, another meaning.
    Rkey, u32
);
whole!(
    /// Local identifier of an InfiniBand port.
    Lid, u16
);
whole!(
    /// Address that the HCA uses, as opposed to a pointer or a position in a heap.
    Iova, u64
);

impl MkeyIndex {
    /// The key of this object with the given variant byte.
    #[must_use]
    pub const fn key(self, variant: u8) -> u32 {
        // CAST: widening in a const fn.
        (self.0 << 8) | variant as u32
    }

    /// The object that a key names, whatever its variant byte.
    #[must_use]
    pub const fn of_key(key: u32) -> Self {
        Self(key >> 8)
    }
}

/// Global identifier of a port: a RoCE address or an InfiniBand GID, in wire order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Gid(pub [u8; 16]);

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&std::net::Ipv6Addr::from(self.0), f)
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({self})")
    }
}

/// Ethernet address, in wire order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The upper 16 and the lower 32 bits, as mailboxes carry them.
    #[must_use]
    pub const fn split(self) -> (u16, u32) {
        let [a, b, c, d, e, f] = self.0;
        (u16::from_be_bytes([a, b]), u32::from_be_bytes([c, d, e, f]))
    }

    /// The address with these upper 16 and lower 32 bits.
    #[must_use]
    pub const fn join(high: u16, low: u32) -> Self {
        let ([a, b], [c, d, e, f]) = (high.to_be_bytes(), low.to_be_bytes());
        Self([a, b, c, d, e, f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mac({self})")
    }
}

/// Packet sequence number: 24 bits on a circle, so there is no order, only distance.
///
/// SPEC: IBTA vol. 1 §9.7.1: sequence numbers are compared modulo 2^24.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Psn(u32);

impl Psn {
    const MASK: u32 = (1 << 24) - 1;

    /// The sequence number with the low 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & Self::MASK)
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

    /// Signed distance from `earlier` to `self` along the shorter way, in [-2^23, 2^23).
    #[must_use]
    pub const fn distance_from(self, earlier: Self) -> i32 {
        let up = self.0.wrapping_sub(earlier.0) & Self::MASK;
        // CAST: the shift moves bit 23 to the sign position and back, which sign-extends.
        ((up << 8) as i32) >> 8
    }

    /// Whether `self` lies in the half circle after `other`.
    #[must_use]
    pub const fn is_after(self, other: Self) -> bool {
        self.distance_from(other) > 0
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

/// Largest payload of one packet on a path, with its code in `qpc.mtu`.
///
/// SPEC: IBTA vol. 1 §9.7: path MTU; codes as in `ibv_mtu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum PathMtu {
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

impl PathMtu {
    /// Every MTU, smallest first.
    pub const ALL: [Self; 5] = [Self::B256, Self::B512, Self::B1024, Self::B2048, Self::B4096];

    /// The code that mailboxes carry.
    #[must_use]
    pub const fn code(self) -> u8 {
        // CAST: a fieldless enum of representation u8.
        self as u8
    }

    /// The MTU that a mailbox code stands for.
    #[must_use]
    pub fn from_code(code: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|mtu| u64::from(mtu.code()) == code)
    }

    /// Payload of one full packet, in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        128 << self.code()
    }
}

mod qp_state;
pub use qp_state::{IllegalTransition, QpState, QpTransition};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_above_its_field_is_refused_with_its_limit() {
        assert_eq!(QpNum::try_from(0xff_ffff).unwrap(), QpNum::MAX);
        let refused = QpNum::try_from(0x100_0000).unwrap_err();
        assert_eq!(refused, OutOfRange { what: "QpNum", value: 0x100_0000, limit: 0xff_ffff });
        assert_eq!(refused.to_string(), "QpNum is 0x1000000, above its limit of 0xffffff");
        assert!(Eqn::try_from(256).is_err());
    }

    #[test]
    #[should_panic(expected = "QpNum does not fit its field")]
    fn wrapping_a_number_that_does_not_fit_panics() {
        let _ = QpNum::new(1 << 24);
    }

    #[test]
    fn psn_distance_wraps_at_2_to_the_24() {
        let last = Psn::new(0xff_ffff);
        assert_eq!(last.plus(1), Psn::new(0));
        assert_eq!(Psn::new(0).distance_from(last), 1);
        assert_eq!(last.distance_from(Psn::new(0)), -1);
        assert_eq!(Psn::new(0x80_0000).distance_from(Psn::new(0)), -0x80_0000);
        assert_eq!(Psn::new(0x7f_ffff).distance_from(Psn::new(0)), 0x7f_ffff);
        assert!(Psn::new(0).is_after(last));
        assert!(!last.is_after(Psn::new(0)));
        assert!(!last.is_after(last));
        assert_eq!(Psn::new(0x1234_5678).get(), 0x34_5678);
    }

    #[test]
    fn path_mtu_codes_and_sizes_agree() {
        let sizes = PathMtu::ALL.map(|mtu| (mtu.code(), mtu.bytes()));
        assert_eq!(sizes, [(1, 256), (2, 512), (3, 1024), (4, 2048), (5, 4096)]);
        assert_eq!(PathMtu::from_code(3), Some(PathMtu::B1024));
        assert_eq!(PathMtu::from_code(0), None);
        assert_eq!(PathMtu::from_code(6), None);
    }

    #[test]
    fn a_mac_splits_into_the_two_mailbox_fields() {
        let mac = Mac([0x02, 0xab, 1, 2, 3, 4]);
        assert_eq!(mac.split(), (0x02ab, 0x0102_0304));
        assert_eq!(Mac::join(0x02ab, 0x0102_0304), mac);
        assert_eq!(mac.to_string(), "02:ab:01:02:03:04");
    }

    #[test]
    fn a_key_is_its_object_and_a_variant() {
        assert_eq!(MkeyIndex::new(0x10).key(0), 0x1000);
        assert_eq!(MkeyIndex::of_key(0x10ab), MkeyIndex::new(0x10));
    }
}
