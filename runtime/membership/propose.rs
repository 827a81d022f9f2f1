//! What a set of rows proposes: the largest set of members that reach each other.
//!
//! Pure functions. Suspicions are edges of a conflict graph; the proposal is its largest independent set, of several
//! the one with the lowest ranks. Most members conflict with nobody; the others fall into small components, each solved
//! by itself: the sum of the largest is the largest, and lowest ranks win in each.

use std::collections::BTreeMap;

use super::RankSet;
use crate::ids::Rank;

/// Choices that a search may look at in one component. Beyond it the best so far stands: still a set whose members
/// reach each other, the same for the same rows, but perhaps not the largest.
const CHOICES_MAX: u32 = 50_000;

/// The largest mutually reachable set of `members`, of several the one with the lowest ranks.
///
/// Two members reach each other unless one of them suspects the other. A member without a row has not answered in time
/// and reaches nobody, whatever others say of it.
///
/// # Examples
/// ```
/// use std::collections::BTreeMap;
/// use ibex::Rank;
/// use ibex::membership::{RankSet, propose};
///
/// let suspects = |ranks: &[u16]| ranks.iter().map(|r| Rank(*r)).collect::<RankSet>();
/// // Rank 1 does not hear rank 2; rank 3 does not answer.
/// let rows = [(0, vec![]), (1, vec![2]), (2, vec![])].map(|(r, s)| (Rank(r), suspects(&s)));
/// let proposal = propose(&RankSet::first(4), &BTreeMap::from(rows));
/// assert_eq!(proposal.to_string(), "{0,1}");
/// ```
#[must_use]
pub fn propose(members: &RankSet, rows: &BTreeMap<Rank, RankSet>) -> RankSet {
    let answered: RankSet = members.iter().filter(|rank| rows.contains_key(rank)).collect();
    let mut conflicts: BTreeMap<Rank, RankSet> = BTreeMap::new();
    for rank in answered.iter() {
        for other in rows[&rank].intersection(&answered).iter().filter(|other| *other != rank) {
            conflicts.entry(rank).or_default().insert(other);
            conflicts.entry(other).or_default().insert(rank);
        }
    }
    let mut proposal = answered;
    let mut left: RankSet = conflicts.keys().copied().collect();
    while let Some(first) = left.lowest() {
        let component = component_of(first, &conflicts);
        left = left.difference(&component);
        let chosen = Search::new(&conflicts).largest(component);
        proposal = proposal.difference(&component).union(&chosen);
    }
    // Nobody answered: the lowest member is a set that trivially reaches itself, but it has not said so.
    proposal
}

/// Whether `proposal` may replace `members`: more than half of them, or exactly half with the lowest.
#[must_use]
pub fn is_quorum(members: &RankSet, proposal: &RankSet) -> bool {
    let (of, have) = (members.len(), proposal.intersection(members).len());
    have * 2 > of || (have * 2 == of && members.lowest().is_some_and(|lowest| proposal.contains(lowest)))
}

/// Everybody that `first` is in conflict with, directly or through others.
fn component_of(first: Rank, conflicts: &BTreeMap<Rank, RankSet>) -> RankSet {
    let mut found = RankSet::EMPTY;
    let mut open = vec![first];
    while let Some(rank) = open.pop() {
        if found.insert(rank) {
            open.extend(conflicts[&rank].difference(&found).iter());
        }
    }
    found
}

/// A search for the largest independent set of one component: the lowest rank first in, then out.
struct Search<'a> {
    conflicts: &'a BTreeMap<Rank, RankSet>,
    best: RankSet,
    choices_left: u32,
}

impl<'a> Search<'a> {
    fn new(conflicts: &'a BTreeMap<Rank, RankSet>) -> Self {
        Self { conflicts, best: RankSet::EMPTY, choices_left: CHOICES_MAX }
    }

    fn largest(mut self, component: RankSet) -> RankSet {
        self.choose(RankSet::EMPTY, component);
        self.best
    }

    /// Lower ranks are tried first, so of equals the first found has the lowest, and only a larger set replaces it.
    fn choose(&mut self, chosen: RankSet, open: RankSet) {
        let in_conflict = |rank: &Rank| !self.conflicts[rank].intersection(&open).is_empty();
        let Some(rank) = open.iter().find(in_conflict) else {
            let all = chosen.union(&open);
            if all.len() > self.best.len() {
                self.best = all;
            }
            return;
        };
        // Of two that conflict at most one stays, so a matching bounds what is left.
        if chosen.len() + open.len() - self.matching(open) <= self.best.len() || self.choices_left == 0 {
            return;
        }
        self.choices_left -= 1;
        let mut without = open;
        without.remove(rank);
        let mut with = chosen;
        with.insert(rank);
        self.choose(with, without.difference(&self.conflicts[&rank]));
        self.choose(chosen, without);
    }

    /// Pairs in conflict that share no rank.
    fn matching(&self, open: RankSet) -> usize {
        let (mut free, mut pairs) = (open, 0);
        for rank in open.iter() {
            if let Some(other) = self.conflicts[&rank].intersection(&free).lowest()
                && free.remove(rank)
            {
                free.remove(other);
                pairs += 1;
            }
        }
        pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(ranks: &[u16]) -> RankSet {
        ranks.iter().map(|rank| Rank(*rank)).collect()
    }

    fn rows(rows: &[(u16, &[u16])]) -> BTreeMap<Rank, RankSet> {
        rows.iter().map(|(rank, suspects)| (Rank(*rank), set(suspects))).collect()
    }

    #[test]
    fn one_way_loss_masks_one_of_the_pair() {
        for (from, to) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))).filter(|(a, b)| a != b) {
            let mut said = rows(&[(0, &[]), (1, &[]), (2, &[]), (3, &[])]);
            said.insert(Rank(to), set(&[from]));
            let proposal = propose(&RankSet::first(4), &said);
            let mut expected = RankSet::first(4);
            expected.remove(Rank(from.max(to)));
            assert_eq!(proposal, expected, "{from} is not heard by {to}");
        }
    }

    #[test]
    fn a_silent_member_reaches_nobody_and_hurts_nobody() {
        let said = rows(&[(0, &[3]), (1, &[]), (2, &[3])]);
        assert_eq!(propose(&RankSet::first(4), &said), RankSet::first(3));
        assert_eq!(propose(&RankSet::first(4), &BTreeMap::new()), RankSet::EMPTY);
        // Who is not a member has no say and no place.
        assert_eq!(propose(&set(&[0, 1]), &rows(&[(0, &[]), (1, &[]), (2, &[0])])), set(&[0, 1]));
    }

    #[test]
    fn of_two_halves_the_one_with_the_lowest_rank_goes_on() {
        let said = rows(&[(0, &[1, 3]), (1, &[]), (2, &[1, 3]), (3, &[])]);
        let proposal = propose(&RankSet::first(4), &said);
        assert_eq!(proposal, set(&[0, 2]));
        assert!(is_quorum(&RankSet::first(4), &proposal) && !is_quorum(&RankSet::first(4), &set(&[1, 3])));
        assert!(
            !is_quorum(&RankSet::first(5), &set(&[0, 1])) && is_quorum(&RankSet::first(5), &set(&[2, 3, 4]))
        );
        assert!(!is_quorum(&RankSet::EMPTY, &RankSet::EMPTY));
    }

    #[test]
    fn large_groups_are_quick() {
        // Two halves that do not hear each other, one rank that nobody hears, a ring of suspicions.
        let half = RankSet::first(256);
        let other = RankSet::first(512).difference(&half);
        let said = RankSet::first(512).iter().map(|r| (r, if half.contains(r) { other } else { half }));
        assert_eq!(propose(&RankSet::first(512), &said.collect()), half);
        let said = (0..512).map(|r| (Rank(r), if r == 9 { RankSet::EMPTY } else { set(&[9]) })).collect();
        assert_eq!(propose(&RankSet::first(512), &said).len(), 511);
        let said = (0..512).map(|r| (Rank(r), set(&[(r + 1) % 512]))).collect();
        assert_eq!(propose(&RankSet::first(512), &said).len(), 256);
    }

    /// The definition, word for word: every subset is looked at.
    fn by_definition(num: u16, said: &BTreeMap<Rank, RankSet>) -> RankSet {
        let reach = |a: Rank, b: Rank| !said[&a].contains(b) && !said[&b].contains(a);
        let mut best = RankSet::EMPTY;
        for bits in 0_u64..1 << num {
            let subset: RankSet = (0..num).filter(|rank| bits >> rank & 1 != 0).map(Rank).collect();
            let members: Vec<Rank> = subset.iter().collect();
            let is_reachable = members.iter().all(|a| said.contains_key(a))
                && members.iter().all(|a| members.iter().all(|b| a == b || reach(*a, *b)));
            let is_lower = || members < best.iter().collect::<Vec<_>>();
            if is_reachable && (subset.len() > best.len() || subset.len() == best.len() && is_lower()) {
                best = subset;
            }
        }
        best
    }

    proptest! {
        #[test]
        fn the_proposal_is_what_its_definition_says(
            num in 1_u16..9,
            suspicions in prop::collection::vec((0_u16..8, 0_u16..8), 0..14),
            silent in prop::collection::vec(0_u16..8, 0..3),
        ) {
            let mut said: BTreeMap<Rank, RankSet> =
                (0..num).map(|rank| (Rank(rank), RankSet::EMPTY)).collect();
            for (by, of) in suspicions {
                if let Some(row) = said.get_mut(&Rank(by)) {
                    row.insert(Rank(of));
                }
            }
            said.retain(|rank, _| !silent.contains(&rank.0));
            let proposal = propose(&RankSet::first(num.into()), &said);
            prop_assert_eq!(proposal, by_definition(num, &said));
        }
    }
}
