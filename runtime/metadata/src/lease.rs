//! Values that are good for a while, and the moment at which they stop being good.
//!
//! INVARIANTS:
//! - the base of a lease is the client's time *before* it asked, so that a guard never outlives what
//!   the store granted, however long the answer took;
//! - between processes a lease travels as remaining time; [`Leased::new`] turns it into a moment of the
//!   local clock once, and nothing moves that moment afterwards.

use core::time::Duration;

use crate::error::StoreError;
use crate::ids::Stamp;

/// A point in time of one monotonic clock, in nanoseconds. Moments of different clocks do not compare.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// This moment plus a duration; saturates.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// The time from `earlier` to this moment; zero if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A value, the snapshot it was taken from, and until when it may be used.
///
/// Holding one is not enough to use it: every use presents it to [`Leased::check`] with the present
/// moment, before the use begins and after it is complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leased<T> {
    value: T,
    stamp: Stamp,
    asked_at: Moment,
    valid_until: Moment,
}

impl<T> Leased<T> {
    /// A value that the store granted for `remaining`, asked for at `asked_at` of the local clock.
    #[must_use]
    pub fn new(value: T, stamp: Stamp, asked_at: Moment, remaining: Duration) -> Self {
        Self { value, stamp, asked_at, valid_until: asked_at.after(remaining) }
    }

    /// The value, if the lease still runs.
    ///
    /// # Errors
    /// [`StoreError::LeaseExpired`] from `valid_until` on.
    pub fn check(&self, now: Moment) -> Result<&T, StoreError> {
        if now < self.valid_until {
            return Ok(&self.value);
        }
        Err(StoreError::LeaseExpired { fence: self.stamp.fence })
    }

    /// What is left of the lease, to be sent to another process; zero once it ran out.
    #[must_use]
    pub fn remaining(&self, now: Moment) -> Duration {
        self.valid_until.since(now)
    }

    /// Whether half of the lease is over: a use in progress should renew it.
    #[must_use]
    pub fn wants_renewal(&self, now: Moment) -> bool {
        self.remaining(now) <= self.valid_until.since(self.asked_at) / 2
    }

    /// Which snapshot the value is from.
    #[must_use]
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// The first moment at which the value is not good any more.
    #[must_use]
    pub fn valid_until(&self) -> Moment {
        self.valid_until
    }

    /// The value whatever the time, for what is not a use: showing it, comparing it, caching it.
    #[must_use]
    pub fn unchecked(&self) -> &T {
        &self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Fence, Version};

    const STAMP: Stamp = Stamp::new(Fence(7), Version(1));

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_guard_is_good_until_its_moment_and_not_at_it() {
        let leased = Leased::new("value", STAMP, Moment(0), ms(10));
        assert_eq!(leased.check(Moment(9_999_999)), Ok(&"value"));
        let expired = StoreError::LeaseExpired { fence: Fence(7) };
        assert_eq!(leased.check(Moment(10_000_000)), Err(expired));
        assert_eq!(leased.remaining(Moment(u64::MAX)), Duration::ZERO);
    }

    #[test]
    fn a_hop_only_ever_shortens_a_lease() {
        let start = Moment::default();
        let first = Leased::new((), STAMP, start, ms(100));
        // 30 ms later it is sent on; the next process asked 5 ms before that, by another clock.
        let elsewhere = Moment(1 << 60);
        let sent = first.remaining(start.after(ms(30)));
        let second = Leased::new((), STAMP, elsewhere, sent);
        assert_eq!(second.valid_until(), elsewhere.after(ms(70)));
        assert!(second.check(elsewhere.after(ms(5 + 64))).is_ok());
        assert!(second.check(elsewhere.after(ms(5 + 65))).is_err());
    }

    #[test]
    fn renewal_is_wanted_from_half_of_the_lease_on() {
        let leased = Leased::new((), STAMP, Moment(0), ms(10));
        assert!(!leased.wants_renewal(Moment(4_999_999)));
        assert!(leased.wants_renewal(Moment(5_000_000)));
    }

    #[test]
    fn moments_saturate() {
        assert_eq!(Moment(u64::MAX - 1).after(Duration::MAX), Moment(u64::MAX));
        assert_eq!(Moment(1).since(Moment(2)), Duration::ZERO);
    }
}
