//! Pauses between attempts: doubled up to a limit, with a part left to chance.
//!
//! Pure. Those who lost a store together must not return together, so each draws its own part, from a seed
//! that is its own.

use core::time::Duration;

/// The pauses of one series of attempts.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
    state: u64,
}

impl Backoff {
    /// Pauses from `first` to `longest`; the part that is chance comes from `seed`.
    #[must_use]
    pub fn new(first: Duration, longest: Duration, seed: u64) -> Self {
        let first = first.min(longest);
        Self { first, longest, next: first, state: seed }
    }

    /// The next pause: between half of its full length and all of it. The one after is twice as long.
    pub fn pause(&mut self) -> Duration {
        let full = self.next;
        self.next = (full * 2).min(self.longest);
        full / 2 + self.share(full / 2)
    }

    /// A random part of a duration, independent of how many attempts failed.
    pub fn share(&mut self, of: Duration) -> Duration {
        // SplitMix64: any seed is a good seed.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // CAST: the upper 16 bits.
        of / (1 << 16) * (z >> 48) as u32
    }

    /// An attempt succeeded: the next series starts with the first pause.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(8);
    const LONGEST: Duration = Duration::from_millis(50);

    #[test]
    fn pauses_double_to_a_limit_and_start_again() {
        let mut backoff = Backoff::new(FIRST, LONGEST, 7);
        for full in [8, 16, 32, 50, 50, 50].map(Duration::from_millis) {
            let pause = backoff.pause();
            assert!(full / 2 <= pause && pause <= full, "{pause:?} of {full:?}");
        }
        backoff.reset();
        assert!(backoff.pause() <= FIRST);
    }

    #[test]
    fn seeds_part_ways() {
        let series = |seed| {
            let mut backoff = Backoff::new(FIRST, LONGEST, seed);
            [(); 8].map(|()| backoff.pause())
        };
        assert_eq!(series(1), series(1));
        assert_ne!(series(1), series(2));
    }

    #[test]
    fn a_first_pause_above_the_limit_is_the_limit() {
        assert!(Backoff::new(LONGEST, FIRST, 0).pause() <= FIRST);
    }
}
