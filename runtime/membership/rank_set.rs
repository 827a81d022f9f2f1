//! A set of ranks, as the bit words that device tables hold.
//!
//! A plain value without allocation; bits follow the order of ranks.

use std::fmt;

use crate::config::NUM_RANKS_MAX;
use crate::ids::Rank;

/// Words of a [`RankSet`]: one bit for each rank that can exist.
const WORDS: usize = NUM_RANKS_MAX as usize / 64;

/// A set of ranks.
///
/// # Examples
/// ```
/// use ibex::Rank;
/// use ibex::membership::RankSet;
///
/// let mut alive = RankSet::first(4);
/// alive.remove(Rank(2));
/// assert_eq!(alive.iter().collect::<Vec<_>>(), [Rank(0), Rank(1), Rank(3)]);
/// assert_eq!(alive.to_string(), "{0,1,3}");
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct RankSet([u64; WORDS]);

impl RankSet {
    /// No rank.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// The ranks `0..num_ranks`; those beyond the largest world do not exist.
    #[must_use]
    pub fn first(num_ranks: u32) -> Self {
        // CAST: NUM_RANKS_MAX fits.
        (0..num_ranks.min(NUM_RANKS_MAX)).map(|rank| Rank(rank as u16)).collect()
    }

    /// The set whose bits are these words, as device tables have them.
    #[must_use]
    pub const fn from_words(words: [u64; WORDS]) -> Self {
        Self(words)
    }

    /// The bits, as device tables have them.
    #[must_use]
    pub const fn words(&self) -> &[u64; WORDS] {
        &self.0
    }

    /// Whether `rank` is in the set.
    #[must_use]
    pub const fn contains(&self, rank: Rank) -> bool {
        let index = rank.index();
        index < NUM_RANKS_MAX as usize && self.0[index / 64] >> (index % 64) & 1 != 0
    }

    /// Adds `rank`; whether it was new.
    ///
    /// # Panics
    /// PANIC: for a rank that no world has; `Config` and the parsers refuse it.
    pub fn insert(&mut self, rank: Rank) -> bool {
        let is_new = !self.contains(rank);
        self.0[rank.index() / 64] |= 1 << (rank.index() % 64);
        is_new
    }

    /// Takes `rank` out; whether it was in.
    pub fn remove(&mut self, rank: Rank) -> bool {
        let was_in = self.contains(rank);
        if was_in {
            self.0[rank.index() / 64] &= !(1 << (rank.index() % 64));
        }
        was_in
    }

    /// How many ranks it has.
    #[must_use]
    pub fn len(&self) -> usize {
        // CAST: at most NUM_RANKS_MAX.
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    /// The lowest rank.
    #[must_use]
    pub fn lowest(&self) -> Option<Rank> {
        self.iter().next()
    }

    /// The ranks, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Rank> + use<> {
        (0..WORDS).zip(self.0).flat_map(|(index, word)| Bits(word).map(move |bit| rank_at(index, bit)))
    }

    /// How many ranks of the set are lower than `rank`.
    #[must_use]
    pub fn position(&self, rank: Rank) -> usize {
        self.iter().take_while(|other| *other < rank).count()
    }

    /// Ranks in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    /// Ranks in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    /// Ranks of this set that are not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    /// Whether every rank is in `other`, too.
    #[must_use]
    pub fn is_subset(&self, other: &Self) -> bool {
        self.difference(other).is_empty()
    }

    fn zip(&self, other: &Self, merge: impl Fn(u64, u64) -> u64) -> Self {
        let mut words = [0; WORDS];
        for ((word, a), b) in words.iter_mut().zip(self.0).zip(other.0) {
            *word = merge(a, b);
        }
        Self(words)
    }
}

/// The set bits of one word, ascending.
struct Bits(u64);

impl Iterator for Bits {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

fn rank_at(word: usize, bit: u32) -> Rank {
    // CAST: below NUM_RANKS_MAX.
    Rank((word * 64) as u16 + bit as u16)
}

impl FromIterator<Rank> for RankSet {
    fn from_iter<I: IntoIterator<Item = Rank>>(ranks: I) -> Self {
        let mut set = Self::EMPTY;
        ranks.into_iter().for_each(|rank| {
            set.insert(rank);
        });
        set
    }
}

impl fmt::Display for RankSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (index, rank) in self.iter().enumerate() {
            write!(f, "{}{rank}", if index == 0 { "" } else { "," })?;
        }
        f.write_str("}")
    }
}

impl fmt::Debug for RankSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_what_was_put_in_across_words() {
        let ranks = [0, 63, 64, 127, 511].map(Rank);
        let mut set: RankSet = ranks.into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), ranks);
        assert_eq!((set.len(), set.lowest(), set.position(Rank(127))), (5, Some(Rank(0)), 3));
        assert!(!set.contains(Rank(512)) && !set.contains(Rank(1)));
        assert!(!set.insert(Rank(64)) && set.remove(Rank(64)) && !set.remove(Rank(64)));
        assert_eq!(RankSet::from_words(*set.words()), set);
        assert_eq!(RankSet::first(600).len(), 512);
    }

    #[test]
    fn sets_combine() {
        let (a, b) = (RankSet::first(3), [1, 2, 70].map(Rank).into_iter().collect::<RankSet>());
        assert_eq!(a.union(&b).to_string(), "{0,1,2,70}");
        assert_eq!(a.intersection(&b).to_string(), "{1,2}");
        assert_eq!(b.difference(&a).to_string(), "{70}");
        assert!(a.intersection(&b).is_subset(&a) && !b.is_subset(&a) && RankSet::EMPTY.is_subset(&a));
    }
}
