//! What was injected, and therefore what may be lost and who may be evicted.
//!
//! Pure. The ledger keeps, per pair of ranks, whether anything touched it that may cost picks, until a switch has made
//! the pair whole again: one of the two was replaced after the injection had ended. It is told by whoever injects and
//! by whoever sees commits; it never asks the group under test why it did something.

use crate::ids::Rank;

/// The state of one unordered pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pair {
    /// Whole for steps from this one on; an older step may still suffer.
    Whole { from_step: u64 },
    /// Touched since this instant. `is_active`: the cause has not ended.
    Touched { is_active: bool },
}

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Ledger {
    num_ranks: usize,
    /// By lower rank, then by higher.
    pairs: Vec<Pair>,
    /// Ranks that may be evicted: something happened to them since they last became members.
    condemned: Vec<bool>,
    /// Ranks that died or were evicted, and are not replaced yet.
    missing: Vec<bool>,
}

impl Ledger {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(num_ranks: u32) -> Self {
        let num_ranks = num_ranks as usize;
        let pairs = vec![Pair::Whole { from_step: 0 }; num_ranks * num_ranks];
        Self { num_ranks, pairs, condemned: vec![false; num_ranks], missing: vec![false; num_ranks] }
    }

    fn pair(&mut self, a: Rank, b: Rank) -> &mut Pair {
        let (low, high) = (a.min(b).index(), a.max(b).index());
        &mut self.pairs[low * self.num_ranks + high]
    }

    fn others(&self, rank: Rank) -> impl Iterator<Item = Rank> + use<> {
        // CAST: at most 512 ranks.
        (0..self.num_ranks as u16).map(Rank).filter(move |other| *other != rank)
    }

    /// Something happened between two ranks that may cost their picks, and one of them its place. `lasts`: until
    /// [`Ledger::pair_ended`].
    pub fn touch_pair(&mut self, a: Rank, b: Rank, lasts: bool) {
        let pair = self.pair(a, b);
        let is_active = lasts || matches!(pair, Pair::Touched { is_active: true });
        *pair = Pair::Touched { is_active };
        self.condemned[a.index()] = true;
        self.condemned[b.index()] = true;
    }

    /// What lasted between two ranks is over.
    pub fn pair_ended(&mut self, a: Rank, b: Rank) {
        if let Pair::Touched { is_active } = self.pair(a, b) {
            *is_active = false;
        }
    }

    /// Something befell a rank: picks to and from it may be lost, and it may be evicted.
    pub fn touch_rank(&mut self, rank: Rank) {
        for other in self.others(rank) {
            let pair = self.pair(rank, other);
            let is_active = matches!(pair, Pair::Touched { is_active: true });
            *pair = Pair::Touched { is_active };
        }
        self.condemned[rank.index()] = true;
    }

    /// The process of `rank` has ended, or will not be waited for: until another one has joined in its place, whoever
    /// joins misses it.
    pub fn died(&mut self, rank: Rank) {
        self.touch_rank(rank);
        self.missing[rank.index()] = true;
    }

    /// The process of `rank` goes on as a member after all: nobody misses it.
    pub fn survived(&mut self, rank: Rank) {
        self.missing[rank.index()] = false;
    }

    /// `rank` was evicted; whether anything allows that.
    pub fn evicted(&mut self, rank: Rank) -> bool {
        let is_allowed = self.condemned[rank.index()];
        self.touch_rank(rank);
        self.missing[rank.index()] = true;
        is_allowed
    }

    /// `joined` became members with a switch that takes effect at `from_step`: what happened to those they replace is
    /// over, unless it still lasts.
    pub fn joined(&mut self, joined: &[Rank], from_step: u64) {
        joined.iter().for_each(|rank| self.missing[rank.index()] = false);
        for &rank in joined {
            self.condemned[rank.index()] = false;
            for other in self.others(rank) {
                if self.missing[other.index()] {
                    continue;
                }
                let pair = self.pair(rank, other);
                match pair {
                    Pair::Touched { is_active: true } => {
                        self.condemned[rank.index()] = true;
                        self.condemned[other.index()] = true;
                    }
                    _ => *pair = Pair::Whole { from_step },
                }
            }
        }
        self.absolve();
    }

    /// Nothing came of what happened between two ranks: they have exchanged whole steps since it ended.
    pub fn healed(&mut self, a: Rank, b: Rank, from_step: u64) {
        let pair = self.pair(a, b);
        if *pair == (Pair::Touched { is_active: false }) {
            *pair = Pair::Whole { from_step };
        }
        self.absolve();
    }

    /// Whether something happened between two ranks that is neither undone nor forgotten.
    pub fn is_touched(&mut self, a: Rank, b: Rank) -> bool {
        matches!(*self.pair(a, b), Pair::Touched { .. })
    }

    /// Who is no longer part of any touched pair may no longer be evicted.
    fn absolve(&mut self) {
        // CAST: at most 512 ranks.
        for rank in (0..self.num_ranks as u16).map(Rank) {
            let touched =
                self.others(rank).any(|other| matches!(*self.pair(rank, other), Pair::Touched { .. }));
            if !touched {
                self.condemned[rank.index()] = false;
            }
        }
    }

    /// Whether a pick between two ranks may be lost in `step`. A rank never loses its own.
    pub fn explains(&mut self, a: Rank, b: Rank, step: u64) -> bool {
        if a == b {
            return false;
        }
        match *self.pair(a, b) {
            Pair::Touched { .. } => true,
            Pair::Whole { from_step } => step < from_step,
        }
    }

    /// Whether no pair is touched.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.pairs.iter().all(|pair| matches!(pair, Pair::Whole { .. }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Rank = Rank(0);
    const B: Rank = Rank(1);
    const C: Rank = Rank(2);

    #[test]
    fn a_death_explains_losses_with_the_dead_until_its_replacement_begins() {
        let mut ledger = Ledger::new(3);
        assert!(!ledger.explains(A, C, 5) && ledger.is_whole());
        ledger.touch_rank(C);
        assert!(ledger.explains(A, C, 5) && ledger.explains(C, B, 5) && !ledger.explains(A, B, 5));
        assert!(ledger.evicted(C));
        ledger.joined(&[C], 9);
        assert!(ledger.explains(C, A, 8) && !ledger.explains(C, A, 9) && ledger.is_whole());
        assert!(!ledger.evicted(C), "nothing has happened to the replacement");
    }

    #[test]
    fn a_cut_pair_condemns_either_end_and_nobody_else() {
        let mut ledger = Ledger::new(3);
        ledger.touch_pair(A, B, true);
        assert!(!ledger.explains(A, C, 1) && !ledger.explains(B, C, 1));
        assert!(!ledger.clone().evicted(C) && ledger.clone().evicted(A) && ledger.evicted(B));
        // It still lasts: the replacement suffers too.
        ledger.joined(&[B], 4);
        assert!(ledger.explains(A, B, 9) && !ledger.explains(B, C, 9));
        ledger.pair_ended(A, B);
        assert!(ledger.explains(A, B, 9) && ledger.evicted(B));
        ledger.joined(&[B], 12);
        assert!(!ledger.explains(A, B, 12) && ledger.is_whole() && !ledger.evicted(A));
    }

    #[test]
    fn a_replacement_misses_whoever_is_still_missing() {
        let mut ledger = Ledger::new(3);
        ledger.touch_rank(A);
        assert!(ledger.evicted(A));
        ledger.touch_rank(B);
        assert!(ledger.evicted(B));
        ledger.joined(&[A], 7);
        assert!(ledger.explains(A, B, 9) && ledger.explains(C, B, 9) && !ledger.explains(A, C, 9));
        ledger.joined(&[B], 11);
        assert!(!ledger.explains(A, B, 11) && ledger.is_whole());
    }

    #[test]
    fn who_joins_misses_a_rank_that_is_dead_and_not_evicted_yet() {
        let mut ledger = Ledger::new(3);
        ledger.died(A);
        assert!(ledger.evicted(A));
        ledger.died(B);
        ledger.joined(&[A], 7);
        assert!(ledger.explains(A, B, 9) && !ledger.explains(A, C, 9));
        assert!(ledger.evicted(B));
        ledger.joined(&[B], 11);
        assert!(!ledger.explains(A, B, 11) && ledger.is_whole());
    }

    #[test]
    fn nothing_explains_the_loss_of_a_ranks_own_picks() {
        let mut ledger = Ledger::new(2);
        ledger.touch_rank(A);
        assert!(!ledger.explains(A, A, 1));
    }
}
