//! Sizes to bins, and which bins hold anything.
//!
//! Plain numbers and bitmaps, a few KiB inside the heap; the lists themselves run through the extents.
//!
//! Row 0 has one bin per length below 32. Every later row covers one power of two and is cut into 32 bins
//! of equal width, so a bin's longest extent is less than 1/32 longer than its shortest:
//!
//! ```text
//!  row 0    0   1   2  ...  31          width 1
//!  row 1   32  33  34  ...  63          width 1
//!  row 2   64  66  68  ... 126          width 2
//!  row r   2^(r+4) ...                  width 2^(r-1)
//! ```

/// Bins per row, as a power of two.
const SUB_LOG2: u32 = 5;
/// Bins per row: bounds the search waste to 1/32 of a request.
const SUBS: usize = 1 << SUB_LOG2;
/// Rows: lengths of 2^(r+4) and more are in row r, and the last row starts at 2^48.
const ROWS: usize = 45;
/// Bins in all.
pub(crate) const NUM_BINS: usize = ROWS * SUBS;
/// Longest extent that has a bin.
pub(crate) const LEN_MAX: u64 = 1 << 48;

const _: () = assert!(bin_of(LEN_MAX) < NUM_BINS);

/// How far to shift a length so that what is left counts steps of its bin's width.
const fn shift_of(len: u64) -> u32 {
    (len | SUBS as u64).ilog2() - SUB_LOG2
}

/// The bin that a free extent of `len` bytes stands in.
#[inline]
pub(crate) const fn bin_of(len: u64) -> usize {
    let shift = shift_of(len);
    // CAST: the shifted length is below 64, its leading bit at 5 carries into the row.
    ((shift as usize) << SUB_LOG2) + (len >> shift) as usize
}

/// The first bin of which every extent has at least `len` bytes; past the last bin where none has.
#[inline]
pub(crate) const fn bin_covering(len: u64) -> usize {
    bin_of(len + ((1 << shift_of(len)) - 1))
}

/// The shortest length that stands in `bin`.
pub(crate) const fn shortest_in(bin: usize) -> u64 {
    let (row, sub) = (bin / SUBS, (bin % SUBS) as u64);
    if row == 0 { sub } else { (SUBS as u64 + sub) << (row - 1) }
}

/// Which bins hold at least one extent: a bit per bin, and a bit per row that has any.
#[derive(Clone, Debug)]
pub(crate) struct Occupancy {
    rows: u64,
    subs: [u32; ROWS],
}

impl Occupancy {
    pub(crate) fn new() -> Self {
        Occupancy { rows: 0, subs: [0; ROWS] }
    }

    #[inline]
    pub(crate) fn set(&mut self, bin: usize) {
        let (row, sub) = (bin / SUBS, bin % SUBS);
        self.subs[row] |= 1 << sub;
        self.rows |= 1 << row;
    }

    /// Clears a bin that became empty, without a branch.
    #[inline]
    pub(crate) fn clear_if(&mut self, bin: usize, empty: bool) {
        let (row, sub) = (bin / SUBS, bin % SUBS);
        self.subs[row] &= !(u32::from(empty) << sub);
        self.rows &= !(u64::from(self.subs[row] == 0) << row);
    }

    /// The first occupied bin at or after `from`, in two bit scans.
    #[inline]
    pub(crate) fn first_from(&self, from: usize) -> Option<usize> {
        let (row, sub) = (from / SUBS, from % SUBS);
        let here = self.subs.get(row)? & (u32::MAX << sub);
        if here != 0 {
            return Some(row * SUBS + here.trailing_zeros() as usize);
        }
        // The shift is in range: a row of `subs` is below 45.
        let later = self.rows & (u64::MAX << (row + 1));
        if later == 0 {
            return None;
        }
        let row = later.trailing_zeros() as usize;
        Some(row * SUBS + self.subs[row].trailing_zeros() as usize)
    }

    /// The last occupied bin: it holds the longest free extent.
    pub(crate) fn last(&self) -> Option<usize> {
        let row = self.rows.checked_ilog2()? as usize;
        Some(row * SUBS + self.subs[row].ilog2() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths on both sides of every bin edge.
    fn edges() -> impl Iterator<Item = u64> {
        (1..NUM_BINS)
            .map(shortest_in)
            .flat_map(|len| [len.saturating_sub(1), len, len + 1])
            .filter(|len| (1..=LEN_MAX).contains(len))
    }

    #[test]
    fn bins_ascend_without_gaps_and_start_where_they_say() {
        for bin in 1..=bin_of(LEN_MAX) {
            let shortest = shortest_in(bin);
            assert_eq!(bin_of(shortest), bin);
            assert_eq!(bin_of(shortest - 1), bin - 1);
        }
    }

    #[test]
    fn a_bin_is_at_most_one_32nd_wide() {
        for bin in SUBS..bin_of(LEN_MAX) {
            let width = shortest_in(bin + 1) - shortest_in(bin);
            assert!(width <= shortest_in(bin) / 32, "bin {bin} is {width} wide");
        }
    }

    #[test]
    fn the_covering_bin_is_the_first_that_always_fits() {
        for len in edges() {
            let bin = bin_covering(len);
            assert!(shortest_in(bin) >= len, "bin {bin} holds extents below {len}");
            assert!(shortest_in(bin - 1) < len, "bin {} would have fitted {len}", bin - 1);
        }
    }

    #[test]
    fn covering_a_length_no_extent_has_leads_past_the_last_bin() {
        let mut full = Occupancy::new();
        (0..NUM_BINS).for_each(|bin| full.set(bin));
        // The largest request the heap can form: capacity, alignment of 2^63.
        assert_eq!(full.first_from(bin_covering(LEN_MAX + (1 << 63))), None);
    }

    #[test]
    fn occupancy_finds_first_and_last_across_rows() {
        let mut map = Occupancy::new();
        assert_eq!((map.first_from(0), map.last()), (None, None));
        for bin in [3, 31, 32, 700, NUM_BINS - 1] {
            map.set(bin);
        }
        assert_eq!(map.first_from(0), Some(3));
        assert_eq!(map.first_from(4), Some(31));
        assert_eq!(map.first_from(32), Some(32));
        assert_eq!(map.first_from(33), Some(700));
        assert_eq!(map.first_from(701), Some(NUM_BINS - 1));
        assert_eq!(map.last(), Some(NUM_BINS - 1));
        map.clear_if(700, false);
        map.clear_if(NUM_BINS - 1, true);
        assert_eq!((map.first_from(701), map.last()), (None, Some(700)));
    }
}
