//! The allocator: finds a free extent, splits it, and joins it again.
//!
//! A [`Heap`] owns its books ([`crate::extents`]) and no byte of the range. It is single-threaded;
//! [`crate::SharedHeap`] puts a lock around one. The invariants are those of the crate.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::HeapError;
use crate::bins::{LEN_MAX, bin_covering, bin_of};
use crate::extents::{Extent, ExtentId, Extents, FREE};
use crate::report::{self, StorageReport};

/// Largest heap: 2^48 bytes, what the bins reach and what virtual addresses span.
pub const CAPACITY_MAX: u64 = LEN_MAX;

/// Most extents, free and live, that a heap can be allowed to keep: books of at most 640 MiB.
pub const EXTENTS_MAX: u32 = 1 << 24;

/// Extents a heap may keep unless told otherwise; thousands of queue pairs need a few each.
pub const EXTENTS_DEFAULT: u32 = 1 << 20;

/// A position in the range a heap manages, in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HeapOffset(u64);

impl HeapOffset {
    /// Wraps a number of bytes from the start of the range.
    pub const fn new(bytes: u64) -> Self {
        HeapOffset(bytes)
    }

    /// Bytes from the start of the range.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Names one live block of one heap; what [`Heap::free`] wants back.
///
/// It is a plain value: copies of it name the same block, and freeing one makes the others stale. The heap
/// tells a stale or foreign one from a live one by a ticket that it issues once. [`crate::Block`] is the
/// guard that frees by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "the block stays live until its allocation is freed"]
pub struct Allocation {
    offset: HeapOffset,
    len: u64,
    ticket: u64,
    id: ExtentId,
    heap: u32,
}

impl Allocation {
    /// First byte of the block.
    pub fn offset(&self) -> HeapOffset {
        self.offset
    }

    /// Bytes in the block: exactly what was asked for.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Always false: a block has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Hands out non-overlapping pieces of `0..capacity` and takes them back.
pub struct Heap {
    /// Tells this heap's allocations from another's: ranks in one process carve alike.
    tag: u32,
    capacity: u64,
    extents_max: u32,
    extents: Extents,
    next_ticket: u64,
    live_bytes: u64,
    live_blocks: u64,
    peak_live_bytes: u64,
    high_water: u64,
}

/// How a block divides the free extent it is cut from.
struct Cut {
    front: u64,
    len: u64,
    back: u64,
}

/// Why a block found no place; small, so that the way without errors returns it in registers.
enum Refusal {
    NoHole,
    NoRecords { needed: u32 },
}

static NEXT_TAG: AtomicU32 = AtomicU32::new(0);

impl Heap {
    /// A heap over `0..capacity` that keeps at most [`EXTENTS_DEFAULT`] extents.
    ///
    /// # Errors
    /// [`HeapError::BadCapacity`] unless `capacity` is in `1..=CAPACITY_MAX`.
    pub fn new(capacity: u64) -> Result<Self, HeapError> {
        Self::with_extents_max(capacity, EXTENTS_DEFAULT)
    }

    /// A heap over `0..capacity` that keeps at most `extents_max` extents, free and live together.
    ///
    /// # Errors
    /// [`HeapError::BadCapacity`] unless `capacity` is in `1..=CAPACITY_MAX`, and
    /// [`HeapError::BadExtentsMax`] unless `extents_max` is in `1..=EXTENTS_MAX`.
    pub fn with_extents_max(capacity: u64, extents_max: u32) -> Result<Self, HeapError> {
        if !(1..=CAPACITY_MAX).contains(&capacity) {
            return Err(HeapError::BadCapacity { capacity, max: CAPACITY_MAX });
        }
        if !(1..=EXTENTS_MAX).contains(&extents_max) {
            return Err(HeapError::BadExtentsMax { extents_max, max: EXTENTS_MAX });
        }
        Ok(Heap {
            tag: NEXT_TAG.fetch_add(1, Ordering::Relaxed),
            capacity,
            extents_max,
            extents: Extents::new(capacity),
            next_ticket: FREE + 1,
            live_bytes: 0,
            live_blocks: 0,
            peak_live_bytes: 0,
            high_water: 0,
        })
    }

    /// Bytes in the range.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Bytes in live blocks now.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// One past the highest byte that was ever part of a block; freeing never lowers it.
    pub fn high_water(&self) -> u64 {
        self.high_water
    }

    /// Takes `len` bytes at an offset that is a multiple of `align`, out of the free ones.
    ///
    /// # Errors
    /// [`HeapError::ZeroSize`] and [`HeapError::BadAlign`] for a request no heap can serve;
    /// [`HeapError::Exhausted`] if no free extent holds the block at that alignment, which is certain and
    /// not a guess; [`HeapError::ExtentsExhausted`] if the books are full.
    #[inline]
    pub fn alloc(&mut self, len: u64, align: u64) -> Result<Allocation, HeapError> {
        if len == 0 {
            return Err(HeapError::ZeroSize);
        }
        if !align.is_power_of_two() {
            return Err(HeapError::BadAlign { align });
        }
        match self.place(len, align) {
            Ok(id) => {
                let Extent { begin, ticket, .. } = self.extents[id];
                Ok(Allocation { offset: HeapOffset(begin), len, ticket, id, heap: self.tag })
            }
            Err(refusal) => Err(self.explain(refusal, len, align)),
        }
    }

    /// Gives a block back; its bytes may be part of the next one.
    ///
    /// # Errors
    /// [`HeapError::UnknownOffset`] if another heap made the allocation, [`HeapError::DoubleFree`] if it was
    /// freed before, also where its bytes have a new owner since.
    #[inline]
    pub fn free(&mut self, block: Allocation) -> Result<(), HeapError> {
        if block.heap != self.tag {
            return Err(HeapError::UnknownOffset { offset: block.offset });
        }
        if !self.is_live(&block) {
            return Err(HeapError::DoubleFree { offset: block.offset });
        }
        self.live_bytes -= block.len;
        self.live_blocks -= 1;
        self.release(block.id);
        Ok(())
    }

    /// Whether the block was allocated here and not freed since.
    #[inline]
    pub fn is_live(&self, block: &Allocation) -> bool {
        let extent = self.extents.get(block.id);
        block.heap == self.tag && extent.is_some_and(|extent| extent.ticket == block.ticket)
    }

    /// Counts what is free and what is live, by bin; O(free extents).
    pub fn storage_report(&self) -> StorageReport {
        StorageReport {
            capacity: self.capacity,
            live_bytes: self.live_bytes,
            live_blocks: self.live_blocks,
            peak_live_bytes: self.peak_live_bytes,
            high_water: self.high_water,
            ..report::free_part(&self.extents)
        }
    }

    /// Checks every invariant of the crate; O(extents), for tests and after faults.
    ///
    /// # Panics
    /// If one does not hold: the heap is broken and so is whatever trusts it.
    pub fn assert_consistent(&self) {
        let (mut at, mut live_bytes, mut live_blocks) = (0, 0, 0);
        let mut free = Vec::new();
        let mut after_free = false;
        for (id, extent) in self.extents.in_order() {
            assert_eq!(extent.begin, at, "extents leave a gap or overlap");
            assert_ne!(extent.len, 0, "extent at {at} is empty");
            assert_eq!(self.extents[extent.after].before, id, "links at {at} disagree");
            assert!(!(after_free && extent.is_free()), "free neighbours at {at} were not joined");
            after_free = extent.is_free();
            if extent.is_free() {
                free.push(at);
            } else {
                live_bytes += extent.len;
                live_blocks += 1;
            }
            at = extent.end();
        }
        assert_eq!(at, self.capacity, "extents do not end where the heap ends");
        assert_eq!((self.live_bytes, self.live_blocks), (live_bytes, live_blocks), "live counts are off");
        assert_eq!(
            free.len() as u64 + live_blocks,
            u64::from(self.extents.in_use()),
            "extents are miscounted"
        );
        assert_eq!(self.extents.lost(), 0, "records are neither in use nor spare");
        assert!(self.live_bytes <= self.peak_live_bytes && self.peak_live_bytes <= self.high_water);
        assert!(self.high_water <= self.capacity);
        assert_eq!(self.listed(), free, "size lists and free extents differ");
    }

    /// Where the extents of all size lists begin, in order.
    fn listed(&self) -> Vec<u64> {
        let lists = self.extents.lists();
        let mut begins = Vec::new();
        let mut next = lists.first_from(0);
        while let Some(bin) = next {
            let before = begins.len();
            // A broken list may be a circle: it is cut where it is longer than the books.
            for (_, extent) in self.extents.in_bin(bin).take(self.extents.in_use() as usize + 1) {
                assert_eq!(bin_of(extent.len), bin, "extent at {} is in another bin's list", extent.begin);
                begins.push(extent.begin);
            }
            assert_ne!(begins.len(), before, "bin {bin} is marked but empty");
            next = lists.first_from(bin + 1);
        }
        begins.sort_unstable();
        begins
    }

    /// Makes a live extent of `len` bytes and counts it.
    fn place(&mut self, len: u64, align: u64) -> Result<ExtentId, Refusal> {
        let hole = self.find(len, align).ok_or(Refusal::NoHole)?;
        let Extent { begin: hole_begin, len: hole_len, .. } = self.extents[hole];
        let begin = align_up(hole_begin, align);
        let (front, back) = (begin - hole_begin, hole_begin + hole_len - (begin + len));
        let needed = u32::from(front > 0) + u32::from(back > 0);
        if needed > self.extents_max - self.extents.in_use() {
            return Err(Refusal::NoRecords { needed });
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.live_bytes += len;
        self.live_blocks += 1;
        self.peak_live_bytes = self.peak_live_bytes.max(self.live_bytes);
        self.high_water = self.high_water.max(begin + len);
        Ok(self.carve(hole, Cut { front, len, back }, ticket))
    }

    /// A free extent that holds the block; `None` is a proof that there is none.
    fn find(&self, len: u64, align: u64) -> Option<ExtentId> {
        let fits = |extent: &Extent| align_up(extent.begin, align) + len <= extent.end();
        let lists = self.extents.lists();
        // The bin of a block freed a moment ago promises no fit, but its first extent often is one; taking
        // it keeps longer extents whole. One try: a second costs more in branches missed than it saves.
        // A length beyond the heap stops here: its bin and all later ones are empty.
        let nearest = lists.first_from(bin_of(len))?;
        let near = lists.first_of(nearest)?;
        if fits(&self.extents[near]) {
            return Some(near);
        }
        // Long enough for any place of an aligned start within the extent, so the first one will do.
        let certain = bin_covering(len + (align - 1));
        if let Some(bin) = lists.first_from(certain) {
            return lists.first_of(bin);
        }
        // Everything free is in bins below `certain`; whether one fits depends on where it begins.
        let mut bin = Some(nearest);
        while let Some(this) = bin {
            if let Some((id, _)) = self.extents.in_bin(this).find(|(_, extent)| fits(extent)) {
                return Some(id);
            }
            bin = lists.first_from(this + 1);
        }
        None
    }

    /// Cuts a live block out of a free extent; what is left on either side stays free.
    fn carve(&mut self, hole: ExtentId, cut: Cut, ticket: u64) -> ExtentId {
        let extents = &mut self.extents;
        let Cut { front, len, back } = cut;
        let hole_begin = extents[hole].begin;
        let begin = hole_begin + front;
        if back > 0 {
            // The old record keeps the back, which is the large part of an untouched range.
            extents.resize(hole, begin + len, back);
            let block = extents.insert_before(hole, begin, len, ticket);
            if front > 0 {
                let front = extents.insert_before(block, hole_begin, front, FREE);
                extents.link(front);
            }
            block
        } else if front > 0 {
            let after = extents[hole].after;
            extents.resize(hole, hole_begin, front);
            extents.insert_before(after, begin, len, ticket)
        } else {
            extents.unlink(hole);
            extents[hole].ticket = ticket;
            hole
        }
    }

    /// Frees a live extent and joins it with the free ones on either side.
    fn release(&mut self, id: ExtentId) {
        let extents = &mut self.extents;
        let (before, after) = (extents[id].before, extents[id].after);
        let (mut begin, mut len) = (extents[id].begin, extents[id].len);
        if extents[before].is_free() {
            begin = extents[before].begin;
            len += extents[before].len;
            if extents[after].is_free() {
                len += extents[after].len;
                extents.unlink(after);
                extents.remove(after);
            }
            extents.remove(id);
            extents.resize(before, begin, len);
        } else if extents[after].is_free() {
            len += extents[after].len;
            extents.remove(id);
            extents.resize(after, begin, len);
        } else {
            extents[id].ticket = FREE;
            extents.link(id);
        }
    }

    #[cold]
    fn explain(&self, refusal: Refusal, requested: u64, align: u64) -> HeapError {
        match refusal {
            Refusal::NoHole => {
                let largest_free = report::largest_free(&self.extents);
                HeapError::Exhausted { requested, align, largest_free, live: self.live_bytes }
            }
            Refusal::NoRecords { needed } => {
                let (limit, in_use) = (self.extents_max, self.extents.in_use());
                HeapError::ExtentsExhausted { limit, in_use, needed }
            }
        }
    }
}

impl fmt::Debug for Heap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heap")
            .field("capacity", &self.capacity)
            .field("live_bytes", &self.live_bytes)
            .field("live_blocks", &self.live_blocks)
            .field("high_water", &self.high_water)
            .finish_non_exhaustive()
    }
}

/// The first multiple of `align` at or after `offset`; no overflow, for offsets end at 2^48.
fn align_up(offset: u64, align: u64) -> u64 {
    (offset + (align - 1)) & !(align - 1)
}
