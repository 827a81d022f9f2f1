//! What a heap looks like from outside: numbers for telemetry, `doctor` and tests.
//!
//! A report is a copy; it owns its numbers and keeps no hold on the heap.

use crate::bins::shortest_in;
use crate::extents::Extents;

/// The state of a heap in numbers; equal reports mean equal books up to the order of the extents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StorageReport {
    /// Bytes in the range.
    pub capacity: u64,
    /// Bytes in live blocks now.
    pub live_bytes: u64,
    /// Live blocks now.
    pub live_blocks: u64,
    /// Most bytes that were ever live at once.
    pub peak_live_bytes: u64,
    /// One past the highest byte that was ever part of a block; never falls.
    pub high_water: u64,
    /// Bytes that are not in a live block.
    pub free_bytes: u64,
    /// Runs of free bytes; after everything is freed there is one.
    pub free_extents: u64,
    /// Longest run of free bytes: what can be allocated at alignment 1.
    pub largest_free: u64,
    /// The size classes that hold a free extent, in ascending order.
    pub bins: Vec<BinReport>,
}

impl StorageReport {
    /// Share of the free bytes outside the largest free extent: 0 is one piece, near 1 is dust.
    pub fn fragmentation(&self) -> f64 {
        if self.free_bytes == 0 {
            return 0.0;
        }
        // Exact: both are at most 2^48.
        1.0 - self.largest_free as f64 / self.free_bytes as f64
    }
}

/// The free extents of one size class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BinReport {
    /// Shortest length that belongs to the class.
    pub shortest: u64,
    /// Free extents in the class.
    pub extents: u64,
    /// Bytes in them.
    pub bytes: u64,
}

/// The part of a report that stands in the size lists; the rest is zero.
pub(crate) fn free_part(extents: &Extents) -> StorageReport {
    let mut report = StorageReport { largest_free: largest_free(extents), ..Default::default() };
    let mut next = extents.lists().first_from(0);
    while let Some(bin) = next {
        let mut class = BinReport { shortest: shortest_in(bin), extents: 0, bytes: 0 };
        for (_, extent) in extents.in_bin(bin) {
            class.extents += 1;
            class.bytes += extent.len;
        }
        report.free_bytes += class.bytes;
        report.free_extents += class.extents;
        report.bins.push(class);
        next = extents.lists().first_from(bin + 1);
    }
    report
}

/// Longest free extent: it stands in the last occupied bin.
pub(crate) fn largest_free(extents: &Extents) -> u64 {
    let last = extents.lists().last();
    let lens = last.into_iter().flat_map(|bin| extents.in_bin(bin)).map(|(_, extent)| extent.len);
    lens.max().unwrap_or(0)
}
