//! The books: one record per extent, free or live, in a slab.
//!
//! The slab owns all records. They are linked by position, in a ring through a sentinel; the size lists of
//! the free ones ([`crate::lists`]) stand beside them. Records given back are chained and used again first,
//! so the slab grows to the most extents ever held and no further.
//!
//! INVARIANT: the sentinel is never free, so joining stops at both ends of the heap without a special case.

use std::ops::{Index, IndexMut};

use crate::bins::bin_of;
use crate::lists::FreeLists;

/// Position of a record in the slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ExtentId(pub(crate) u32);

impl ExtentId {
    /// Stands before the first extent and after the last.
    pub(crate) const SENTINEL: ExtentId = ExtentId(0);
    /// Ends the chain of spare records.
    const NONE: ExtentId = ExtentId(u32::MAX);

    fn some(self) -> Option<ExtentId> {
        (self != Self::NONE).then_some(self)
    }
}

/// Ticket of an extent that is free, and of a record that is in no use.
pub(crate) const FREE: u64 = 0;
/// Ticket of the sentinel; no allocation carries it.
const NEVER: u64 = u64::MAX;

/// A run of bytes that is wholly free or wholly live.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) begin: u64,
    pub(crate) len: u64,
    /// [`FREE`], or the number that the live block's allocation must repeat.
    pub(crate) ticket: u64,
    pub(crate) before: ExtentId,
    pub(crate) after: ExtentId,
}

// Half a cache line: a record never straddles two.
const _: () = assert!(size_of::<Extent>() == 32);

impl Extent {
    pub(crate) fn is_free(&self) -> bool {
        self.ticket == FREE
    }

    pub(crate) fn end(&self) -> u64 {
        self.begin + self.len
    }
}

/// All records of one heap, and the size lists over the free ones.
#[derive(Debug)]
pub(crate) struct Extents {
    records: Vec<Extent>,
    spare: ExtentId,
    in_use: u32,
    lists: FreeLists,
}

impl Extents {
    /// Books of a heap whose one extent is free and `capacity` bytes long.
    pub(crate) fn new(capacity: u64) -> Self {
        let sentinel =
            Extent { begin: 0, len: 0, ticket: NEVER, before: ExtentId::SENTINEL, after: ExtentId::SENTINEL };
        let mut extents =
            Extents { records: vec![sentinel], spare: ExtentId::NONE, in_use: 0, lists: FreeLists::new() };
        extents.lists.admit(ExtentId::SENTINEL);
        let all = extents.insert_before(ExtentId::SENTINEL, 0, capacity, FREE);
        extents.link(all);
        extents
    }

    /// Extents of the heap, the sentinel not counted.
    pub(crate) fn in_use(&self) -> u32 {
        self.in_use
    }

    pub(crate) fn get(&self, id: ExtentId) -> Option<&Extent> {
        self.records.get(id.0 as usize)
    }

    /// Records that are neither in use nor on the chain of spare ones; anything but 0 is a leak.
    pub(crate) fn lost(&self) -> usize {
        let spare = std::iter::successors(self.spare.some(), |&id| self[id].after.some());
        // The sentinel is a record too.
        self.records.len() - 1 - self.in_use as usize - spare.take(self.records.len()).count()
    }

    /// Every extent by position.
    pub(crate) fn in_order(&self) -> impl Iterator<Item = (ExtentId, &Extent)> {
        let step = |id: ExtentId| (id != ExtentId::SENTINEL).then_some(id);
        let first = step(self[ExtentId::SENTINEL].after);
        std::iter::successors(first, move |&id| step(self[id].after)).map(|id| (id, &self[id]))
    }

    /// Every free extent of one bin, last freed first.
    pub(crate) fn in_bin(&self, bin: usize) -> impl Iterator<Item = (ExtentId, &Extent)> {
        self.lists.iter(bin).map(|id| (id, &self[id]))
    }

    pub(crate) fn lists(&self) -> &FreeLists {
        &self.lists
    }

    /// Adds a record between `next` and what stands before it; a free one is in no size list yet.
    #[inline]
    pub(crate) fn insert_before(&mut self, next: ExtentId, begin: u64, len: u64, ticket: u64) -> ExtentId {
        let before = self[next].before;
        let record = Extent { begin, len, ticket, before, after: next };
        let id = self.store(record);
        self[before].after = id;
        self[next].before = id;
        self.in_use += 1;
        id
    }

    fn store(&mut self, record: Extent) -> ExtentId {
        if let Some(id) = self.spare.some() {
            self.spare = self[id].after;
            self[id] = record;
            return id;
        }
        // CAST: the heap keeps at most EXTENTS_MAX records, far below 2^32.
        let id = ExtentId(self.records.len() as u32);
        self.records.push(record);
        self.lists.admit(id);
        id
    }

    /// Takes a record that is in no size list out of the heap; a neighbour has absorbed its bytes.
    #[inline]
    pub(crate) fn remove(&mut self, id: ExtentId) {
        let Extent { before, after, .. } = self[id];
        self[before].after = after;
        self[after].before = before;
        let spare = self.spare;
        let record = &mut self[id];
        record.ticket = FREE;
        record.after = spare;
        self.spare = id;
        self.in_use -= 1;
    }

    /// Puts a free extent into the size list of its bin.
    #[inline]
    pub(crate) fn link(&mut self, id: ExtentId) {
        self.lists.insert(id, bin_of(self[id].len));
    }

    /// Takes a free extent out of its size list.
    #[inline]
    pub(crate) fn unlink(&mut self, id: ExtentId) {
        self.lists.remove(id, bin_of(self[id].len));
    }

    /// Moves the edges of a free extent; it changes lists only where it changes bins.
    #[inline]
    pub(crate) fn resize(&mut self, id: ExtentId, begin: u64, len: u64) {
        let record = &mut self[id];
        let (old, new) = (bin_of(record.len), bin_of(len));
        record.begin = begin;
        record.len = len;
        // A large extent that is nibbled at stays in its bin.
        if old != new {
            self.lists.remove(id, old);
            self.lists.insert(id, new);
        }
    }
}

impl Index<ExtentId> for Extents {
    type Output = Extent;

    fn index(&self, id: ExtentId) -> &Extent {
        &self.records[id.0 as usize]
    }
}

impl IndexMut<ExtentId> for Extents {
    fn index_mut(&mut self, id: ExtentId) -> &mut Extent {
        &mut self.records[id.0 as usize]
    }
}
