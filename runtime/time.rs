//! The clock of the root package: the only file of it that reads one.
//!
//! Everything else takes time as an argument, or asks for a [`Stopwatch`] or a [`Deadline`] from
//! here, so that a simulation can run the rest on virtual time. Nothing here owns memory.
//!
//! INVARIANT: all values but [`unix_ns`] come from one monotonic clock; none of them ever goes backwards.

use core::time::Duration;
use std::sync::OnceLock;
use std::time::{Instant, SystemTime};

/// Nanoseconds of the monotonic clock since the first call in this process.
///
/// Saturates after 584 years.
pub fn now_ns() -> u64 {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    saturating_ns(ORIGIN.get_or_init(Instant::now).elapsed())
}

/// Nanoseconds since 1970, for people and files; never for a decision.
///
/// It may jump; 0 on a machine that believes to live before 1970.
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, saturating_ns)
}

/// Suspends the calling thread for at least `duration`.
pub fn sleep(duration: Duration) {
    std::thread::sleep(duration);
}

/// Measures how long something takes.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch {
    started: Instant,
}

impl Stopwatch {
    /// Starts measuring now.
    pub fn start() -> Self {
        Self { started: Instant::now() }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Nanoseconds since the start.
    pub fn elapsed_ns(&self) -> u64 {
        saturating_ns(self.elapsed())
    }
}

/// A point in time after which a bounded wait gives up.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    started: Instant,
    budget: Duration,
}

impl Deadline {
    /// The deadline that lies `budget` ahead of now; any budget is valid, `Duration::MAX` never passes.
    pub fn after(budget: Duration) -> Self {
        Self { started: Instant::now(), budget }
    }

    /// What is left of the budget; zero once the deadline has passed.
    pub fn remaining(&self) -> Duration {
        self.budget.saturating_sub(self.started.elapsed())
    }

    /// Whether the budget is used up.
    pub fn has_passed(&self) -> bool {
        self.remaining().is_zero()
    }
}

fn saturating_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_never_goes_backwards() {
        let mut last = now_ns();
        for _ in 0..1000 {
            let now = now_ns();
            assert!(now >= last);
            last = now;
        }
    }

    #[test]
    fn a_sleep_shows_on_stopwatch_and_deadline() {
        let watch = Stopwatch::start();
        let deadline = Deadline::after(Duration::from_millis(2));
        assert!(!deadline.has_passed());
        sleep(Duration::from_millis(3));
        assert!(watch.elapsed_ns() >= 3_000_000);
        assert!(deadline.has_passed());
        assert_eq!(deadline.remaining(), Duration::ZERO);
    }

    #[test]
    fn the_calendar_is_in_this_century() {
        let years = unix_ns() / 1_000_000_000 / 31_556_952;
        assert!((50..130).contains(&years), "{years} years after 1970");
    }

    #[test]
    fn extreme_budgets_are_valid() {
        assert!(Deadline::after(Duration::ZERO).has_passed());
        assert!(!Deadline::after(Duration::MAX).has_passed());
    }

    #[test]
    fn nanoseconds_saturate() {
        assert_eq!(saturating_ns(Duration::MAX), u64::MAX);
    }
}
