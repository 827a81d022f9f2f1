//! Numbers with a meaning. Each is issued by one party and compared by one rule.
//!
//! | notion | issued by | changes when | answers |
//! |---|---|---|---|
//! | [`InstanceId`] | the process, once | the process restarts | is this the same peer? |
//! | [`Fence`] | the store, on claim | the name gets another owner | may this writer still write? |
//! | [`Version`] | the store, on publish | the content changes | which snapshot is newer? |
//! | [`LeaseId`] | the store, on claim | with the fence | is the owner alive? |

use std::fmt;

/// Which process: 128 random bits, drawn once per process. Never a clock, never a counter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId([u8; 16]);

impl InstanceId {
    /// The identity made of these bits; `None` if all are zero, which stands for "none" on the wire.
    #[must_use]
    pub const fn new(bits: u128) -> Option<Self> {
        if bits == 0 { None } else { Some(Self(bits.to_be_bytes())) }
    }

    /// The identity that these bytes spell, big-endian; `None` if all are zero.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Option<Self> {
        Self::new(u128::from_be_bytes(bytes))
    }

    /// The 16 bytes of the wire.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InstanceId({self})")
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// The store's per-name token: grows with every claim; a writer that holds a lower one is refused.
    Fence
}
number! {
    /// Order of snapshots under one fence: 0 right after a claim, one more with every publish.
    Version
}
number! {
    /// One grant of liveness; the store alone times it.
    LeaseId
}
number! {
    /// A position in a store's history of changes, where a watch can resume. Never given twice.
    Revision
}
number! {
    /// Identity of a registered buffer, chosen by its owner. Addresses and keys are reused; this is not.
    BufferId
}

/// Order of snapshots of one name: by fence, then by version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stamp {
    /// Which ownership.
    pub fence: Fence,
    /// Which snapshot within it.
    pub version: Version,
}

impl Stamp {
    /// The stamp of these two numbers.
    #[must_use]
    pub const fn new(fence: Fence, version: Version) -> Self {
        Self { fence, version }
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.fence, self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_ordered_by_fence_first() {
        let stamp = |fence, version| Stamp::new(Fence(fence), Version(version));
        assert!(stamp(2, 0) > stamp(1, u64::MAX));
        assert!(stamp(u64::MAX, 1) > stamp(u64::MAX, 0));
    }

    #[test]
    fn zero_is_no_instance() {
        assert_eq!(InstanceId::new(0), None);
        assert_eq!(InstanceId::from_bytes([0; 16]), None);
        let id = InstanceId::new(u128::MAX).unwrap();
        assert_eq!(InstanceId::from_bytes(id.to_bytes()), Some(id));
        assert_eq!(InstanceId::new(255).unwrap().to_string(), "000000000000000000000000000000ff");
    }
}
