//! Host memory that plays the part of GPU memory.
//!
//! A [`Mapping`] owns its pages: private ones, ones that other processes may map, or another process's.
//! [`Allocations`] knows which ranges are live, so that copies are
//! checked, and keeps dropped mappings until the GPU has no work outstanding: a kernel that was
//! queued before the drop still finds its memory.
//!
//! INVARIANT: kernels and devices write this memory while we look at it, so every access here is
//! atomic, word by word, and no reference to it is ever formed.
#![expect(
    unsafe_code,
    reason = "maps pages and copies through raw addresses; callers see checked ranges only"
)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ibex_hca::shared_memory::{PeerAccess, PeerRegion, SharedMemoryError, SharedRegion};
use parking_lot::{Mutex, RwLock};

use super::super::{GpuError, GpuField};
use super::raw;

/// Pages of x86-64.
const PAGE: usize = 4096;
/// From this length on a mapping is aligned to, and asks for, huge pages.
const HUGE_PAGE: usize = 2 << 20;
/// Longest allocation: 2^46 bytes, half of what a process can address.
const ALLOC_LEN_MAX: usize = 1 << 46;

/// When the pages of an allocation come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// With the allocation, as a GPU does it: no kernel ever stops for a page fault.
    #[default]
    AtAllocation,
    /// With the first use. Groups with room for the worst routing start sooner and take less memory; times are off.
    OnFirstUse,
}

/// Pages that are unmapped when dropped.
pub(super) struct Mapping {
    /// First usable byte.
    addr: usize,
    _pages: Pages,
}

#[expect(dead_code, reason = "what a variant holds is only dropped")]
enum Pages {
    Private(Anonymous),
    Shared(SharedRegion),
    Peer(PeerRegion),
}

/// Anonymous pages of this process.
struct Anonymous {
    base: usize,
    mapped_len: usize,
}

impl Mapping {
    /// Maps `len` zeroed bytes at a multiple of `align`.
    pub(super) fn new(len: usize, align: usize, backing: Backing) -> Result<Self, GpuError> {
        let align = checked_align(len, align)?;
        // The kernel aligns to pages; for more, map the slack as well and use the aligned part of it.
        let mapped_len = len.next_multiple_of(PAGE) + (align - PAGE);
        let base = map_pages(mapped_len)?;
        let mapping = Self {
            addr: base.next_multiple_of(align),
            _pages: Pages::Private(Anonymous { base, mapped_len }),
        };
        mapping.back(len, backing);
        Ok(mapping)
    }

    /// The same, in pages that other processes may map.
    pub(super) fn shared(len: usize, align: usize, backing: Backing) -> Result<Self, GpuError> {
        let align = checked_align(len, align)?;
        let region = SharedRegion::new(len as u64, align as u64).map_err(refused)?;
        let mapping = Self { addr: region.as_ptr().expose_provenance(), _pages: Pages::Shared(region) };
        mapping.back(len, backing);
        Ok(mapping)
    }

    /// Maps another process's pages.
    pub(super) fn of_peer(handle: &[u8]) -> Result<(Self, usize), GpuError> {
        let region = PeerRegion::open(handle, PeerAccess::ReadWrite).map_err(refused)?;
        // CAST: a mapping's length fits.
        let len = region.len() as usize;
        Ok((Self { addr: region.as_ptr().expose_provenance(), _pages: Pages::Peer(region) }, len))
    }

    /// Large mappings are backed at once, if they are to be.
    fn back(&self, len: usize, backing: Backing) {
        if len >= HUGE_PAGE && backing == Backing::AtAllocation {
            back_with_huge_pages(self.addr, len.next_multiple_of(PAGE));
        }
    }

    pub(super) fn addr(&self) -> u64 {
        self.addr as u64
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: `base` and `mapped_len` are what mmap returned, and nobody holds a reference into
        // the pages.
        unsafe { libc::munmap(self.base as *mut libc::c_void, self.mapped_len) };
    }
}

/// What memory between processes refuses, in this room's words.
pub(super) fn refused(error: SharedMemoryError) -> GpuError {
    match error {
        SharedMemoryError::Os { call, errno } => GpuError::Os { call, code: errno },
        other => GpuError::Shared(other),
    }
}

/// The alignment to map with.
fn checked_align(len: usize, align: usize) -> Result<usize, GpuError> {
    check_range(GpuField::AllocLen, len, ALLOC_LEN_MAX)?;
    check_range(GpuField::AllocAlign, align, ALLOC_LEN_MAX)?;
    if !align.is_power_of_two() {
        return Err(GpuError::BadAlignment { align });
    }
    Ok(align.max(if len >= HUGE_PAGE { HUGE_PAGE } else { PAGE }))
}

fn check_range(field: GpuField, value: usize, max: usize) -> Result<(), GpuError> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err(GpuError::OutOfRange { field, value: value as u64, min: 1, max: max as u64 })
}

fn map_pages(len: usize) -> Result<usize, GpuError> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let base = unsafe { libc::mmap(core::ptr::null_mut(), len, protection, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        let code = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        return Err(GpuError::Os { call: "mmap", code });
    }
    Ok(base as usize)
}

/// Asks for huge pages, and for all of them now: GPU memory is backed when it is allocated, and a kernel that stops
/// for a page fault is timed wrong. A system that can do neither answers with an error; small pages that come on
/// first use serve as well.
fn back_with_huge_pages(addr: usize, len: usize) {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_POPULATE_WRITE] {
        // SAFETY: the range lies inside a mapping that we just made; neither advice changes contents.
        unsafe { libc::madvise(addr as *mut libc::c_void, len, advice) };
    }
}

/// Live ranges of one GPU, and mappings that wait for it to become idle.
#[derive(Default)]
pub(super) struct Allocations {
    /// First address -> length.
    live: RwLock<BTreeMap<u64, usize>>,
    retired: Mutex<Vec<Mapping>>,
    /// n: the n-th access or allocation from now fails; 0: none does.
    failing: AtomicU64,
}

impl Allocations {
    /// Lets the access behind the next `skip` ones fail, or none; whether a failure was waiting.
    pub(super) fn fail_access(&self, skip: Option<u32>) -> bool {
        self.failing.swap(skip.map_or(0, |skip| u64::from(skip) + 1), Ordering::Relaxed) != 0
    }

    /// The failure that strikes this access, if one does.
    pub(super) fn strike(&self) -> Result<(), GpuError> {
        if self.failing.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        let count_down = |left: u64| left.checked_sub(1);
        match self.failing.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count_down) {
            Ok(1) => Err(GpuError::Os { call: "an access that was to fail", code: libc::EIO }),
            _ => Ok(()),
        }
    }

    pub(super) fn insert(&self, mapping: &Mapping, len: usize) {
        self.live.write().insert(mapping.addr(), len);
    }

    /// Ends a range's life; its pages stay until someone drops [`Allocations::take_retired`].
    pub(super) fn retire(&self, mapping: Mapping) {
        // Waits for copies in progress, which hold the table for reading.
        self.live.write().remove(&mapping.addr());
        self.retired.lock().push(mapping);
    }

    /// Everything retired so far, to be unmapped. Call when no queued work can name it.
    pub(super) fn take_retired(&self) -> Vec<Mapping> {
        core::mem::take(&mut *self.retired.lock())
    }

    /// Bytes of all live ranges.
    pub(super) fn live_bytes(&self) -> u64 {
        self.live.read().values().map(|len| *len as u64).sum()
    }

    #[cfg(test)]
    pub(super) fn num_retired(&self) -> usize {
        self.retired.lock().len()
    }

    pub(super) fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), GpuError> {
        // SAFETY: `with_live` has checked that the range stays mapped during the call.
        self.with_live(addr, bytes.len(), || unsafe { raw::copy_in(addr as usize, bytes) })
    }

    pub(super) fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        // SAFETY: as above.
        self.with_live(addr, bytes.len(), || unsafe { raw::copy_out(addr as usize, bytes) })
    }

    pub(super) fn fill(&self, addr: u64, byte: u8, len: usize) -> Result<(), GpuError> {
        // SAFETY: as above.
        self.with_live(addr, len, || unsafe { raw::fill_in(addr as usize, byte, len) })
    }

    pub(super) fn load_u32(&self, addr: u64) -> Result<u32, GpuError> {
        self.with_word(addr, 4, |ptr| {
            // SAFETY: live and aligned, says `with_word`; everyone accesses this memory atomically.
            unsafe { AtomicU32::from_ptr(ptr.cast()) }.load(Ordering::Acquire)
        })
    }

    pub(super) fn store_u32(&self, addr: u64, value: u32) -> Result<(), GpuError> {
        self.with_word(addr, 4, |ptr| {
            // SAFETY: as in `load_u32`.
            unsafe { AtomicU32::from_ptr(ptr.cast()) }.store(value, Ordering::Release);
        })
    }

    pub(super) fn load_u64(&self, addr: u64) -> Result<u64, GpuError> {
        self.with_word(addr, 8, |ptr| {
            // SAFETY: as in `load_u32`.
            unsafe { AtomicU64::from_ptr(ptr.cast()) }.load(Ordering::Acquire)
        })
    }

    pub(super) fn store_u64(&self, addr: u64, value: u64) -> Result<(), GpuError> {
        self.with_word(addr, 8, |ptr| {
            // SAFETY: as in `load_u32`.
            unsafe { AtomicU64::from_ptr(ptr.cast()) }.store(value, Ordering::Release);
        })
    }

    /// Runs `access` on one naturally aligned word that is known to stay mapped.
    fn with_word<T>(&self, addr: u64, len: usize, access: impl FnOnce(*mut u8) -> T) -> Result<T, GpuError> {
        let align = len as u64;
        if !addr.is_multiple_of(align) {
            return Err(GpuError::Misaligned { addr, align });
        }
        self.with_live(addr, len, || access(addr as *mut u8))
    }

    /// Runs `access` while the range is known to stay mapped.
    fn with_live<T>(&self, addr: u64, len: usize, access: impl FnOnce() -> T) -> Result<T, GpuError> {
        self.strike()?;
        let live = self.live.read();
        let refused = GpuError::NotAllocated { addr, len };
        let Some((&begin, &live_len)) = live.range(..=addr).next_back() else {
            return Err(refused);
        };
        let offset = addr - begin;
        if offset > live_len as u64 || len as u64 > live_len as u64 - offset {
            return Err(refused);
        }
        Ok(access())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(len: usize, align: usize) -> (Allocations, Mapping) {
        let allocations = Allocations::default();
        let mapping = Mapping::new(len, align, Backing::default()).unwrap();
        allocations.insert(&mapping, len);
        (allocations, mapping)
    }

    #[test]
    fn memory_is_zeroed_and_aligned() {
        for (len, align) in [(1, 1), (4097, 64), (100, 1 << 16), (3 << 20, 4096), (10, 4 << 20)] {
            let (allocations, mapping) = live(len, align);
            assert!(mapping.addr().is_multiple_of(align.max(4096) as u64));
            let mut bytes = vec![0xff; len];
            allocations.read(mapping.addr(), &mut bytes).unwrap();
            assert!(bytes.iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn every_offset_and_length_round_trips_and_touches_nothing_else() {
        let (allocations, mapping) = live(64, 64);
        let data: Vec<u8> = (1..=40).collect();
        for offset in 0..24 {
            for len in 0..=data.len() {
                allocations.fill(mapping.addr(), 0xa5, 64).unwrap();
                allocations.write(mapping.addr() + offset as u64, &data[..len]).unwrap();
                let mut all = [0; 64];
                allocations.read(mapping.addr(), &mut all).unwrap();
                let mut part = vec![0; len];
                allocations.read(mapping.addr() + offset as u64, &mut part).unwrap();
                assert_eq!(part, &data[..len]);
                assert!(all[..offset].iter().chain(&all[offset + len..]).all(|&byte| byte == 0xa5));
            }
        }
    }

    #[test]
    fn fill_covers_exactly_its_range() {
        let (allocations, mapping) = live(64, 64);
        for (offset, len) in [(0, 64), (1, 5), (3, 30), (7, 1), (8, 8), (9, 0)] {
            allocations.fill(mapping.addr(), 0, 64).unwrap();
            allocations.fill(mapping.addr() + offset as u64, 7, len).unwrap();
            let mut all = [0; 64];
            allocations.read(mapping.addr(), &mut all).unwrap();
            for (i, &byte) in all.iter().enumerate() {
                assert_eq!(byte == 7, (offset..offset + len).contains(&i), "byte {i} of {offset}+{len}");
            }
        }
    }

    #[test]
    fn a_range_outside_one_live_allocation_is_refused() {
        let (allocations, mapping) = live(100, 64);
        let addr = mapping.addr();
        for (addr, len) in
            [(addr, 101), (addr + 100, 1), (addr - 1, 1), (addr + 1, usize::MAX), (u64::MAX, 2), (0, 0)]
        {
            let refused = Err(GpuError::NotAllocated { addr, len });
            assert_eq!(allocations.fill(addr, 0, len), refused);
        }
        assert_eq!(allocations.fill(addr + 100, 0, 0), Ok(()));
        allocations.retire(mapping);
        assert_eq!(allocations.read(addr, &mut [0]), Err(GpuError::NotAllocated { addr, len: 1 }));
    }

    #[test]
    fn words_are_checked_for_alignment() {
        let (allocations, mapping) = live(16, 16);
        let addr = mapping.addr();
        allocations.store_u64(addr + 8, u64::MAX - 1).unwrap();
        assert_eq!(allocations.load_u64(addr + 8), Ok(u64::MAX - 1));
        allocations.store_u32(addr + 4, 9).unwrap();
        assert_eq!(allocations.load_u32(addr + 4), Ok(9));
        assert_eq!(allocations.load_u64(addr + 4), Err(GpuError::Misaligned { addr: addr + 4, align: 8 }));
        assert_eq!(
            allocations.store_u32(addr + 2, 0),
            Err(GpuError::Misaligned { addr: addr + 2, align: 4 })
        );
    }

    #[test]
    fn bad_sizes_and_alignments_are_refused() {
        let refused = |len, align| Mapping::new(len, align, Backing::default()).err();
        let range =
            |field, value, max: usize| Some(GpuError::OutOfRange { field, value, min: 1, max: max as u64 });
        assert_eq!(refused(0, 8), range(GpuField::AllocLen, 0, ALLOC_LEN_MAX));
        assert_eq!(refused(ALLOC_LEN_MAX + 1, 8), range(GpuField::AllocLen, (1 << 46) + 1, ALLOC_LEN_MAX));
        assert_eq!(refused(8, 0), range(GpuField::AllocAlign, 0, ALLOC_LEN_MAX));
        assert_eq!(refused(8, 24), Some(GpuError::BadAlignment { align: 24 }));
    }
}
