//! The clock of this crate's shell: the only file that reads one, and the only one that sleeps.
//!
//! The pure part takes [`Moment`]s as arguments. A [`Clock`] is monotonic; its origin means nothing.

use core::time::Duration;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use tokio::sync::watch;

use crate::error::StoreError;
use crate::lease::Moment;

/// Far enough from 0 that a clock can be set back in a test.
const ORIGIN_NS: u64 = 1 << 60;

/// A monotonic clock, of the system or driven by a test.
#[derive(Debug, Clone)]
pub struct Clock(Kind);

#[derive(Debug, Clone)]
enum Kind {
    System { skew_ns: i64 },
    Manual { now: Arc<watch::Sender<u64>>, skew_ns: i64 },
}

impl Default for Clock {
    fn default() -> Self {
        Self::system()
    }
}

impl Clock {
    /// The system's monotonic clock.
    #[must_use]
    pub fn system() -> Self {
        Self(Kind::System { skew_ns: 0 })
    }

    /// The same clock, shifted by so much more: what a client with a wrong clock has.
    #[must_use]
    pub fn skewed(&self, by_ns: i64) -> Self {
        Self(match &self.0 {
            Kind::System { skew_ns } => Kind::System { skew_ns: skew_ns + by_ns },
            Kind::Manual { now, skew_ns } => Kind::Manual { now: Arc::clone(now), skew_ns: skew_ns + by_ns },
        })
    }

    /// A clock that moves only by [`Clock::advance`]. Clones share it.
    #[must_use]
    pub fn manual() -> Self {
        Self(Kind::Manual { now: Arc::new(watch::Sender::new(ORIGIN_NS)), skew_ns: 0 })
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Moment {
        match &self.0 {
            Kind::System { skew_ns } => shifted(system_ns(), *skew_ns),
            Kind::Manual { now, skew_ns } => shifted(*now.borrow(), *skew_ns),
        }
    }

    /// Moves a manual clock; `false`, and no effect, for the system's.
    pub fn advance(&self, by: Duration) -> bool {
        let Kind::Manual { now, .. } = &self.0 else { return false };
        now.send_modify(|now| *now = Moment(*now).after(by).0);
        true
    }

    /// Waits until `moment` has come.
    pub async fn sleep_until(&self, moment: Moment) {
        match &self.0 {
            Kind::System { .. } => tokio::time::sleep(moment.since(self.now())).await,
            Kind::Manual { now, skew_ns } => {
                let mut now = now.subscribe();
                // The sender lives as long as `self`.
                let _ = now.wait_for(|&now| shifted(now, *skew_ns) >= moment).await;
            }
        }
    }
}

/// Nanoseconds since 1970: information for people and for protocols that want it, never part of a rule.
#[cfg(feature = "grpc")]
pub(crate) fn unix_ns() -> i64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// The same in milliseconds.
#[cfg(feature = "grpc")]
pub(crate) fn unix_ms() -> i64 {
    unix_ns() / 1_000_000
}

fn shifted(ns: u64, by_ns: i64) -> Moment {
    Moment(ns.saturating_add_signed(by_ns))
}

fn system_ns() -> u64 {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    let elapsed = ORIGIN.get_or_init(Instant::now).elapsed();
    Moment(ORIGIN_NS).after(elapsed).0
}

/// Runs an operation under a budget of real time.
///
/// # Errors
/// [`StoreError::Deadline`] when the budget is used up; whether the operation took effect is unknown.
pub async fn within<T>(
    budget: Duration,
    operation: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(budget, operation).await {
        Ok(result) => result,
        Err(_) => Err(StoreError::Deadline { budget }),
    }
}

/// Suspends the task for a real duration: a pause between attempts, never part of a rule.
pub(crate) async fn pause(duration: Duration) {
    tokio::time::sleep(duration).await;
}

/// Something to do again and again, at a pace of real time that no work in between slows down.
#[cfg(feature = "k8s")]
pub(crate) struct Ticker(tokio::time::Interval);

#[cfg(feature = "k8s")]
impl Ticker {
    /// The first tick comes after one period. Must be called inside tokio.
    pub(crate) fn every(period: Duration) -> Self {
        let mut interval = tokio::time::interval(period);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        interval.reset();
        Self(interval)
    }

    /// Waits for the next tick.
    pub(crate) async fn tick(&mut self) {
        self.0.tick().await;
    }
}

/// Waits for something to end, but no longer than this.
#[cfg(feature = "grpc")]
pub(crate) async fn at_most(budget: Duration, operation: impl Future<Output = ()>) {
    // Whether it ended makes no difference to the caller.
    let _ = tokio::time::timeout(budget, operation).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_move_forwards_and_skew_is_constant() {
        let skewed = |seconds: i64| Clock::system().skewed(seconds * 1_000_000_000);
        let (early, late) = (skewed(-600), skewed(600));
        let (before, after) = (early.now(), late.now());
        assert!(after.since(before) >= Duration::from_secs(1200));
        assert!(early.now() >= before);
        assert!(!early.advance(Duration::from_secs(1)), "the system's clock is not ours to move");
    }

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = Clock::manual();
        let start = clock.now();
        assert_eq!(clock.clone().now(), start);
        assert!(clock.advance(Duration::from_millis(5)));
        assert_eq!(clock.now().since(start), Duration::from_millis(5));
    }
}
