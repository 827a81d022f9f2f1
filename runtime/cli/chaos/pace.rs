//! How long ranks of a campaign may be silent, by what the machine has for them.
//!
//! No detector tells a process that gets no processor from one that is dead, so the budget must be far longer than any
//! time for which a live process may have to wait for one. Two things bound that time from below: how many ranks share
//! a core, and how long a thread that has something to do waits for a core right now, beside as many busy threads as
//! there are ranks and whatever else the machine runs. What came of both stands in the report.
//!
//! Owns nothing; the threads of the measurement end with it.

use core::time::Duration;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use ibex::time::{Deadline, Stopwatch, sleep};

/// Silence that is borne for each rank that has to share a core.
const MS_PER_RANK_OF_A_CORE: u32 = 250;
/// The budget is so many times the longest delay of a thread: the sender of a sign of life, its device, and the device
/// that takes it in each wait once, and the measurement is short.
const BUDGET_PER_DELAY: u64 = 20;
/// The longest budget; a machine that needs a longer one is no place for a campaign.
const DETECT_MS_MAX: u32 = 10_000;
/// The budget is a multiple of this.
const GRAIN_MS: u32 = 50;
/// How long delays are measured, and how long the thread that measures sleeps at a time.
const MEASURED: Duration = Duration::from_millis(400);
const NAP: Duration = Duration::from_millis(1);

/// What the machine has for so many ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    pub(super) cores: u32,
    /// Ranks that share a core, rounded up.
    pub(super) ranks_per_core: u32,
    /// The longest that a thread had to wait for a core.
    pub(super) delay: Duration,
}

impl Pace {
    /// Measures it; takes [`MEASURED`].
    pub(super) fn measure(ranks: u32) -> Self {
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        Self { cores, ranks_per_core: ranks.div_ceil(cores), delay: longest_delay(ranks) }
    }

    /// How long a rank may be silent here.
    pub(super) fn detect_ms(&self) -> u32 {
        let by_delay =
            u64::try_from(self.delay.as_millis()).unwrap_or(u64::MAX).saturating_mul(BUDGET_PER_DELAY);
        let by_delay = u32::try_from(by_delay).unwrap_or(DETECT_MS_MAX);
        let by_cores = self.ranks_per_core.saturating_mul(MS_PER_RANK_OF_A_CORE);
        by_cores.max(by_delay).next_multiple_of(GRAIN_MS).min(DETECT_MS_MAX)
    }
}

/// How long a thread that wakes up waits for a core at most, beside so many that never sleep.
fn longest_delay(busy: u32) -> Duration {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..busy {
            let spin = || {
                while !is_over.load(Ordering::Relaxed) {
                    spin_loop();
                }
            };
            // Where no thread can be had the measurement is that of an emptier machine; the ranks will fail by name.
            let _ = thread::Builder::new().spawn_scoped(scope, spin);
        }
        let (until, mut longest) = (Deadline::after(MEASURED), Duration::ZERO);
        while !until.has_passed() {
            let nap = Stopwatch::start();
            sleep(NAP);
            longest = longest.max(nap.elapsed().saturating_sub(NAP));
        }
        is_over.store(true, Ordering::Relaxed);
        longest
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_follows_cores_and_delays_within_its_limits() {
        let pace = |ranks_per_core, delay_ms| Pace {
            cores: 2,
            ranks_per_core,
            delay: Duration::from_millis(delay_ms),
        };
        assert_eq!(pace(4, 12).detect_ms(), 1_000);
        assert_eq!(pace(1, 3).detect_ms(), 250);
        assert_eq!(pace(4, 61).detect_ms(), 1_250);
        assert_eq!(pace(32, 10_000_000).detect_ms(), DETECT_MS_MAX);
    }
}
