//! The numbers with a meaning: ranks, experts, tokens, epochs, generations, slots.
//!
//! Owns no memory. A bare integer in an interface invites swapping two of them; these newtypes make
//! that a compile error. They are plain values: ordering is only derived where "less" means something.
//!
//! INVARIANT: a `Generation` is never zero, because a zero signal word means "nothing yet".

use std::fmt;

/// Defines an index newtype with its accessors; ordering is derived because indices are walked in order.
macro_rules! index {
    ($(#[$doc:meta])* $name:ident($int:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl $name {
            /// The number as an array index.
            #[must_use]
            pub const fn index(self) -> usize {
                // CAST: widening, usize has at least 32 bits on every supported target.
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

index! {
    /// A member's index in the world, `0..num_ranks`.
    Rank(u16)
}
index! {
    /// A global expert, `0..num_experts`.
    ExpertIdx(u16)
}
index! {
    /// An expert relative to the rank that serves it.
    LocalExpertIdx(u16)
}
index! {
    /// A token of one rank's batch, `0..max_tokens`.
    TokenIdx(u32)
}
index! {
    /// The place a queue pair lives; it survives recreation of the queue pair.
    QpSlot(u32)
}
index! {
    /// A set of queue pairs, signal words and counters for one stream of concurrent work.
    Lane(u32)
}

/// Membership version, and nothing else; stamps every handle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u32);

impl Epoch {
    /// The epoch after this one.
    ///
    /// # Panics
    /// PANIC: after 2^32 - 1 changes of membership, which one process cannot live to see.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("fewer than 2^32 membership changes"))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Step counter in a signal word: a sequence number folded into 32 bits, never zero.
///
/// It wraps, so it has no `Ord`; words are compared for equality and, where a skipped step must be
/// told from an old one, by [`Generation::is_after`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation(u32);

impl Generation {
    /// The generation of sequence number `seq`; the circle has 2^32 - 1 steps, because 0 is none of them.
    #[must_use]
    pub const fn of_seq(seq: u64) -> Self {
        // CAST: the remainder is below 2^32 - 1.
        Self(1 + (seq % 0xffff_ffff) as u32)
    }

    /// The value as it stands in a signal word.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Whether `self` is newer than `other` on the circle.
    #[must_use]
    pub const fn is_after(self, other: Self) -> bool {
        let ahead = self.0.wrapping_sub(other.0);
        ahead != 0 && ahead < 1 << 31
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_is_never_zero_and_differs_from_its_neighbours() {
        for seq in [0, 1, 0xffff_fffd, 0xffff_fffe, 0xffff_ffff, 1 << 32, u64::MAX - 1] {
            let (now, next) = (Generation::of_seq(seq), Generation::of_seq(seq + 1));
            assert!(now.get() != 0 && next.is_after(now) && !now.is_after(next), "{seq}");
            assert!(!now.is_after(now));
        }
        assert_eq!(Generation::of_seq(0xffff_fffe).get(), u32::MAX);
        assert_eq!(Generation::of_seq(0xffff_ffff).get(), 1);
    }

    #[test]
    fn half_the_circle_ahead_is_not_newer() {
        let first = Generation::of_seq(0);
        assert!(Generation::of_seq((1 << 31) - 1).is_after(first));
        assert!(!Generation::of_seq(1 << 31).is_after(first));
    }

    #[test]
    fn epochs_advance() {
        assert_eq!(Epoch(4).next(), Epoch(5));
        assert!(Epoch(4) < Epoch(5));
    }
}
