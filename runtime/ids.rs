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
        Self(
            self.0
                .checked_add(1)
                .expect("fewer than 2^32 membership changes"),
        )
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Step counter in a signal word: the low 32 bits of a sequence number, never zero.
///
/// It wraps, so it has no `Ord`; words are compared for equality and, where a skipped step must be
/// told from an old one, by [`Generation::is_after`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation(u32);

impl Generation {
    /// The generation of sequence number `seq`, or `None` for the one value in 2^32 that has none.
    #[must_use]
    pub const fn of_seq(seq: u64) -> Option<Self> {
        // CAST: the generation is the low half by definition.
        match seq as u32 {
            0 => None,
            low => Some(Self(low)),
        }
    }

    /// The value as it stands in a signal word.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Whether `self` is newer than `other` on the circle of 2^32 steps.
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

    fn generation(seq: u64) -> Generation {
        Generation::of_seq(seq).unwrap()
    }

    #[test]
    fn generation_is_the_low_half_and_never_zero() {
        assert_eq!(Generation::of_seq(0), None);
        assert_eq!(Generation::of_seq(1 << 32), None);
        assert_eq!(generation((1 << 32) + 7).get(), 7);
    }

    #[test]
    fn generation_order_survives_the_wrap() {
        let last = generation(u64::from(u32::MAX));
        let first = generation((1 << 32) + 1);
        assert!(first.is_after(last));
        assert!(!last.is_after(first));
        assert!(!first.is_after(first));
        assert!(generation(1 << 31).is_after(generation(1)));
        assert!(!generation((1 << 31) + 1).is_after(generation(1)));
    }

    #[test]
    fn epochs_advance() {
        assert_eq!(Epoch(4).next(), Epoch(5));
        assert!(Epoch(4) < Epoch(5));
    }
}
