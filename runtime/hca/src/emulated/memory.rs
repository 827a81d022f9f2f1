//! Raw memory: the one place where the emulated device touches bytes that others touch too.
//!
//! Kernels, hosts and peers access the same memory at the same time, so it is never a Rust slice. A
//! [`Span`] is a range that the IOMMU granted; words that another agent polls are single atomic
//! accesses, bulk payload moves through `memmove` on raw pointers, as a DMA engine would move it.
//!
//! Memory on a bus ([`crate::bus`]) has spans too: their addresses carry a tag that no address of a process has, and
//! every access looks for it first.
//!
//! *Who owns what.* Nothing here owns the caller's memory. [`Iommu`] keeps the list of ranges that
//! callers granted (by `register` and `create_umem`, which are `unsafe` for that reason) and the
//! mappings it made itself for descriptors.
//!
//! INVARIANT: a `Span` is used only while its window is granted. Spans from memory keys live no longer
//! than a read guard of the key table; rings hold their umem, whose release is refused while they live.
#![expect(unsafe_code, reason = "DMA: reads and writes memory that other agents own")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::bus::{self, BusId};
use crate::shared_memory::{PeerRegion, SharedRegion};

/// Bytes in the smallest page that the device maps.
pub(super) const PAGE: u64 = 4096;

/// Marks the address of memory on a bus; no pointer of a process has this bit.
const ON_BUS: u64 = 1 << 62;
/// Where the bus stands in such an address, above the address on it.
const BUS_SHIFT: u32 = 48;
/// Addresses on a bus lie below this.
pub(super) const COPIED_END: u64 = 1 << BUS_SHIFT;
/// Bytes that are moved at a time between two spans of which one lies on a bus.
const BOUNCE: usize = 16 << 10;

/// A place on a bus.
#[derive(Debug, Clone, Copy)]
struct OnBus {
    bus: BusId,
    addr: u64,
}

impl OnBus {
    /// What an address means, if it is tagged.
    #[inline]
    fn of(at: *mut u8) -> Option<Self> {
        let addr = at.addr() as u64;
        if addr & ON_BUS == 0 {
            return None;
        }
        // CAST: 14 bits lie between the tag and the address.
        let bus = BusId::of(((addr & !ON_BUS) >> BUS_SHIFT) as u16);
        Some(Self { bus, addr: addr & (COPIED_END - 1) })
    }

    fn word<const N: usize>(self) -> [u8; N] {
        let mut word = [0; N];
        bus::read(self.bus, self.addr, &mut word);
        word
    }

    fn set<const N: usize>(self, word: [u8; N]) {
        bus::write(self.bus, self.addr, &word);
    }
}

/// A range of memory that was granted to the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    base: *mut u8,
    len: u64,
}

// SAFETY: a Span is an address and a length; what may happen behind it is concurrent by contract.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    /// A span of no bytes, for zero-length messages.
    pub(super) const EMPTY: Self = Self { base: std::ptr::null_mut(), len: 0 };

    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn addr(&self) -> u64 {
        self.base.addr() as u64
    }

    /// The part `[offset, offset + len)`, if it lies inside.
    #[inline]
    pub(super) fn slice(&self, offset: u64, len: u64) -> Option<Self> {
        if offset > self.len || len > self.len - offset {
            return None;
        }
        // CAST: offset <= len of a live range, which fits usize.
        Some(Self { base: self.base.wrapping_add(offset as usize), len })
    }

    #[inline]
    fn at(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset, "DMA outside its span");
        // CAST: in bounds, as asserted.
        self.base.wrapping_add(offset as usize)
    }

    #[inline]
    fn word32(&self, offset: u64) -> &AtomicU32 {
        let word = self.at(offset, 4).cast::<u32>();
        assert!(word.is_aligned(), "unaligned 32-bit DMA word");
        // SAFETY: in bounds of a granted range and aligned, as asserted; other agents access this word
        // by single 4-byte accesses (grant contract).
        unsafe { AtomicU32::from_ptr(word) }
    }

    #[inline]
    fn word64(&self, offset: u64) -> &AtomicU64 {
        let word = self.at(offset, 8).cast::<u64>();
        assert!(word.is_aligned(), "unaligned 64-bit DMA word");
        // SAFETY: as for `word32`, with 8 bytes.
        unsafe { AtomicU64::from_ptr(word) }
    }

    #[inline]
    pub(super) fn load32(&self, offset: u64, order: Ordering) -> u32 {
        match OnBus::of(self.at(offset, 4)) {
            Some(place) => u32::from_ne_bytes(place.word()),
            None => self.word32(offset).load(order),
        }
    }

    #[inline]
    pub(super) fn load64(&self, offset: u64, order: Ordering) -> u64 {
        match OnBus::of(self.at(offset, 8)) {
            Some(place) => u64::from_ne_bytes(place.word()),
            None => self.word64(offset).load(order),
        }
    }

    #[inline]
    pub(super) fn store32(&self, offset: u64, value: u32, order: Ordering) {
        match OnBus::of(self.at(offset, 4)) {
            Some(place) => place.set(value.to_ne_bytes()),
            None => self.word32(offset).store(value, order),
        }
    }

    #[inline]
    pub(super) fn store64(&self, offset: u64, value: u64, order: Ordering) {
        match OnBus::of(self.at(offset, 8)) {
            Some(place) => place.set(value.to_ne_bytes()),
            None => self.word64(offset).store(value, order),
        }
    }

    /// Changes the 4-byte word at `offset` atomically and returns what it was. On a bus it is atomic among what this
    /// device does, as atomics of a NIC are.
    pub(super) fn update32(&self, offset: u64, change: impl Fn(u32) -> u32) -> u32 {
        if let Some(place) = OnBus::of(self.at(offset, 4)) {
            let old = u32::from_ne_bytes(place.word());
            place.set(change(old).to_ne_bytes());
            return old;
        }
        let word = self.word32(offset);
        match word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| Some(change(old))) {
            Ok(old) | Err(old) => old,
        }
    }

    /// Changes the 8-byte word at `offset`; see [`update32`](Self::update32).
    pub(super) fn update64(&self, offset: u64, change: impl Fn(u64) -> u64) -> u64 {
        if let Some(place) = OnBus::of(self.at(offset, 8)) {
            let old = u64::from_ne_bytes(place.word());
            place.set(change(old).to_ne_bytes());
            return old;
        }
        let word = self.word64(offset);
        match word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| Some(change(old))) {
            Ok(old) | Err(old) => old,
        }
    }

    /// Whether the word of `len` bytes at `offset` is naturally aligned in memory.
    pub(super) fn is_aligned(&self, offset: u64, len: u64) -> bool {
        (self.addr() + offset).is_multiple_of(len)
    }

    /// Asks the processor to bring a line near; outside the span it asks for nothing.
    #[inline]
    pub(super) fn prefetch(&self, offset: u64) {
        #[cfg(target_arch = "x86_64")]
        if offset < self.len && OnBus::of(self.base).is_none() {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let line = self.at(offset, 1).cast_const().cast();
            // SAFETY: a prefetch has no effect that a program can see, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = offset;
    }

    /// Reads one 64-byte block, such as a WQEBB.
    ///
    /// Its writer is done with it, by the doorbell protocol; one that is not gives the device torn bytes.
    #[inline]
    pub(super) fn read_block(&self, offset: u64, out: &mut [u8; 64]) {
        let from = self.at(offset, 64);
        if let Some(place) = OnBus::of(from) {
            return bus::read(place.bus, place.addr, out);
        }
        // SAFETY: 64 bytes are in bounds of a granted range; `out` is ours and cannot overlap it.
        unsafe { move_bytes(out.as_mut_ptr(), from, 64) };
    }

    /// Reads `out.len()` bytes at any alignment.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        let from = self.at(offset, out.len() as u64);
        if let Some(place) = OnBus::of(from) {
            return bus::read(place.bus, place.addr, out);
        }
        // SAFETY: the source is in bounds of a granted range; `out` is ours and cannot overlap it.
        unsafe { move_bytes(out.as_mut_ptr(), from, out.len()) };
    }

    /// Writes bytes that the device holds (inline data) at any alignment.
    ///
    /// ORDER(5): a naturally aligned word of 4 or 8 bytes is one release store, so that a poller of the
    /// word sees all that this device wrote before it.
    #[inline]
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let to = self.at(offset, data.len() as u64);
        if let Some(place) = OnBus::of(to) {
            return bus::write(place.bus, place.addr, data);
        }
        // SAFETY: the target is in bounds of a granted range; `data` is ours.
        unsafe { place(to, data.as_ptr(), data.len()) };
    }

    /// Moves `len` bytes from another span; see [`write`](Self::write) for small words.
    #[inline]
    pub(super) fn copy_from(&self, offset: u64, source: Self, source_offset: u64, len: u64) {
        let to = self.at(offset, len);
        let from = source.at(source_offset, len);
        if OnBus::of(to).or(OnBus::of(from)).is_some() {
            return self.bounce_from(offset, source, source_offset, len);
        }
        // SAFETY: both ranges are in bounds of granted ranges. CAST: `len` is within a live range.
        unsafe { place(to, from, len as usize) };
    }
}

impl Span {
    /// Moves bytes to or from a bus, in pieces; the two do not overlap.
    #[cold]
    fn bounce_from(&self, offset: u64, source: Self, source_offset: u64, len: u64) {
        let mut bytes = [0; BOUNCE];
        let mut done = 0;
        while done < len {
            // CAST: at most BOUNCE.
            let piece = (len - done).min(BOUNCE as u64) as usize;
            source.read(source_offset + done, &mut bytes[..piece]);
            self.write(offset + done, &bytes[..piece]);
            done += piece as u64;
        }
    }

    /// The bytes of a region that this process shares with others; whoever uses the span holds the region.
    pub(super) fn of_region(region: &SharedRegion) -> Self {
        Self { base: region.as_ptr(), len: region.len() }
    }
}

/// Memory of another process, mapped for reading.
///
/// It may change at any instant, to anything: nothing read from it is believed, and nothing is read twice
/// where the two must agree. Whoever uses the span holds the region that it was made from.
#[derive(Debug, Clone, Copy)]
pub(super) struct PeerSpan(Span);

impl PeerSpan {
    pub(super) fn of_region(region: &PeerRegion) -> Self {
        Self(Span { base: region.as_ptr(), len: region.len() })
    }

    pub(super) const fn len(&self) -> u64 {
        self.0.len
    }

    /// The part `[offset, offset + len)`, if it lies inside.
    #[inline]
    pub(super) fn slice(&self, offset: u64, len: u64) -> Option<Self> {
        self.0.slice(offset, len).map(Self)
    }

    #[inline]
    pub(super) fn load32(&self, offset: u64, order: Ordering) -> u32 {
        self.0.load32(offset, order)
    }

    #[inline]
    pub(super) fn load64(&self, offset: u64, order: Ordering) -> u64 {
        self.0.load64(offset, order)
    }

    #[inline]
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        self.0.read(offset, out);
    }

    /// Address of the 4-byte word at `offset`.
    pub(super) fn word_addr(&self, offset: u64) -> u64 {
        self.0.at(offset, 4).addr() as u64
    }

    /// The same bytes as the source of a copy; a write to them would be a fault.
    #[inline]
    pub(super) const fn source(&self) -> Span {
        self.0
    }
}

/// Places payload the way a DMA engine does: small aligned words whole, the rest as bytes.
///
/// # Safety
/// Both ranges are valid for `len` bytes; other agents may access them, which may tear the bytes but
/// nothing else.
#[inline]
unsafe fn place(to: *mut u8, from: *const u8, len: usize) {
    match len {
        8 if to.cast::<u64>().is_aligned() => {
            // SAFETY: 8 bytes are readable; alignment of the source is not assumed.
            let word = unsafe { from.cast::<u64>().read_unaligned() };
            // SAFETY: 8 writable bytes, aligned.
            unsafe { AtomicU64::from_ptr(to.cast()) }.store(word, Ordering::Release);
        }
        4 if to.cast::<u32>().is_aligned() => {
            // SAFETY: 4 bytes are readable.
            let word = unsafe { from.cast::<u32>().read_unaligned() };
            // SAFETY: 4 writable bytes, aligned.
            unsafe { AtomicU32::from_ptr(to.cast()) }.store(word, Ordering::Release);
        }
        // SAFETY: the caller's contract.
        _ => unsafe { move_bytes(to, from, len) },
    }
}

/// Moves bytes as a device would: opaque to the compiler, which may assume nothing about them.
///
/// The C library serves short and overlapping moves. Between, it copies backwards where source and target
/// lie at the same offset in their pages, which defeats the prefetcher: such moves go forward here.
///
/// # Safety
/// Both ranges are valid for `len` bytes.
#[inline]
unsafe fn move_bytes(to: *mut u8, from: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        let apart = to.addr().abs_diff(from.addr()) >= len;
        if len >= forward::SHORTEST && apart {
            // SAFETY: the caller's contract, and the ranges do not overlap.
            return unsafe { forward::copy(to, from, len) };
        }
    }
    if len != 0 {
        // SAFETY: the caller's contract; overlap is allowed.
        unsafe { libc::memmove(to.cast(), from.cast(), len) };
    }
}

/// Copying from low to high addresses.
#[cfg(target_arch = "x86_64")]
mod forward {
    use std::arch::asm;

    /// Shorter moves are not worth a loop.
    pub(super) const SHORTEST: usize = 128;
    /// From here the processor's own string copy is faster than a loop.
    const STRING: usize = 2048;

    /// Copies `len` bytes forward.
    ///
    /// # Safety
    /// Both ranges are valid for `len >= SHORTEST` bytes and do not overlap.
    pub(super) unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
        if len >= STRING {
            // SAFETY: reads and writes `len` bytes; the direction flag is clear by the calling convention.
            unsafe {
                asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
                    options(nostack, preserves_flags));
            }
            return;
        }
        // The last block may overlap the one before it: the same bytes are written twice.
        let end = len - 64;
        // SAFETY: each block of 64 bytes lies inside both ranges.
        unsafe { block(to.wrapping_add(end), from.wrapping_add(end)) };
        let mut at = 0;
        while at < end {
            // SAFETY: as above, because `at + 64 <= end + 64 = len`.
            unsafe { block(to.wrapping_add(at), from.wrapping_add(at)) };
            at += 64;
        }
    }

    /// Copies 64 bytes: all are read before any is written.
    #[inline]
    unsafe fn block(to: *mut u8, from: *const u8) {
        // SAFETY: the caller's contract: 64 bytes are valid at both.
        unsafe {
            asm!(
                "movups {a}, [{from}]", "movups {b}, [{from} + 16]",
                "movups {c}, [{from} + 32]", "movups {d}, [{from} + 48]",
                "movups [{to}], {a}", "movups [{to} + 16], {b}",
                "movups [{to} + 32], {c}", "movups [{to} + 48], {d}",
                a = out(xmm_reg) _, b = out(xmm_reg) _, c = out(xmm_reg) _, d = out(xmm_reg) _,
                from = in(reg) from, to = in(reg) to,
                options(nostack, preserves_flags)
            );
        }
    }
}

/// Zeroed memory of the device itself, such as a doorbell page.
#[derive(Debug)]
pub(super) struct OwnPage {
    base: NonNull<u8>,
}

// SAFETY: exclusively owned allocation, accessed by atomics only.
unsafe impl Send for OwnPage {}
// SAFETY: as above.
unsafe impl Sync for OwnPage {}

impl OwnPage {
    const LAYOUT: Layout = match Layout::from_size_align(PAGE as usize, PAGE as usize) {
        Ok(layout) => layout,
        Err(_) => panic!("a page is a valid layout"),
    };

    pub(super) fn new() -> Self {
        // SAFETY: the layout has a size other than zero.
        let base = unsafe { alloc_zeroed(Self::LAYOUT) };
        match NonNull::new(base) {
            Some(base) => Self { base },
            None => handle_alloc_error(Self::LAYOUT),
        }
    }

    pub(super) fn span(&self) -> Span {
        Span { base: self.base.as_ptr(), len: PAGE }
    }
}

impl Drop for OwnPage {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout and not freed before.
        unsafe { dealloc(self.base.as_ptr(), Self::LAYOUT) };
    }
}

/// A descriptor's memory, mapped by the device.
#[derive(Debug)]
struct Mapping {
    base: *mut u8,
    len: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `Iommu::map` and not unmapped before. A failure leaves the range mapped,
        // which is safe.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

#[derive(Debug)]
struct Window {
    id: WindowId,
    base: *mut u8,
    len: u64,
    /// Keeps the pages alive for memory behind a descriptor.
    _mapping: Option<Mapping>,
}

// SAFETY: a window is a fact about addresses; see Span.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

/// Names one grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct WindowId(u64);

/// Why memory could not be granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MapFailed {
    pub(super) errno: i32,
}

/// The ranges of memory that the device may touch at all.
///
/// Mailboxes carry addresses, and mailboxes are not `unsafe`: what they name is checked against this.
#[derive(Debug, Default)]
pub(super) struct Iommu {
    windows: Vec<Window>,
    next: u64,
}

impl Iommu {
    /// Grants memory of this process.
    ///
    /// # Safety
    /// The range is valid, and stays so, for concurrent access until [`revoke`](Self::revoke).
    pub(super) unsafe fn grant(&mut self, addr: u64, len: u64) -> WindowId {
        // CAST: addresses of this process fit usize.
        let base = std::ptr::with_exposed_provenance_mut(addr as usize);
        self.push(base, len, None)
    }

    /// Grants memory on a bus; returns the grant and its address here. `None` if it does not end below
    /// [`COPIED_END`].
    pub(super) fn grant_copied(&mut self, bus: BusId, addr: u64, len: u64) -> Option<(WindowId, u64)> {
        addr.checked_add(len).filter(|end| *end <= COPIED_END)?;
        let tagged = ON_BUS | u64::from(bus.get()) << BUS_SHIFT | addr;
        // CAST: a number that is looked at before anything follows it.
        let base = std::ptr::without_provenance_mut(tagged as usize);
        Some((self.push(base, len, None), tagged))
    }

    /// Maps and grants `len` bytes behind a descriptor; returns the grant and its address here.
    pub(super) fn map(&mut self, fd: RawFd, offset: u64, len: u64) -> Result<(WindowId, u64), MapFailed> {
        let lead = offset % PAGE;
        let (Ok(size), Ok(start)) = (usize::try_from(len + lead), libc::off_t::try_from(offset - lead))
        else {
            return Err(MapFailed { errno: libc::EINVAL });
        };
        let flags = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, flags, libc::MAP_SHARED, fd, start) };
        if base == libc::MAP_FAILED {
            let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            return Err(MapFailed { errno });
        }
        let base = base.cast::<u8>();
        let mapping = Mapping { base, len: size };
        // CAST: below a page.
        let first = base.wrapping_add(lead as usize);
        Ok((self.push(first, len, Some(mapping)), first.expose_provenance() as u64))
    }

    fn push(&mut self, base: *mut u8, len: u64, mapping: Option<Mapping>) -> WindowId {
        let id = WindowId(self.next);
        self.next += 1;
        self.windows.push(Window { id, base, len, _mapping: mapping });
        id
    }

    /// Takes a grant back.
    pub(super) fn revoke(&mut self, id: WindowId) {
        self.windows.retain(|window| window.id != id);
    }

    /// What one grant covers of `[addr, addr + len)`, if it covers any of its beginning.
    pub(super) fn span_up_to(&self, addr: u64, len: u64) -> Option<Span> {
        let reach = |window: &Window| {
            let offset = addr.checked_sub(window.base.addr() as u64)?;
            let room = window.len.checked_sub(offset).filter(|room| *room != 0)?;
            Span { base: window.base, len: window.len }.slice(offset, len.min(room))
        };
        self.windows.iter().filter_map(reach).max_by_key(Span::len)
    }

    /// The range `[addr, addr + len)`, if one grant covers it.
    pub(super) fn span(&self, addr: u64, len: u64) -> Option<Span> {
        self.windows.iter().find_map(|window| {
            let offset = addr.checked_sub(window.base.addr() as u64)?;
            Span { base: window.base, len: window.len }.slice(offset, len)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(words: &mut [u64]) -> Span {
        let mut iommu = Iommu::default();
        let (addr, len) = (words.as_mut_ptr().expose_provenance() as u64, size_of_val(words) as u64);
        // SAFETY: the borrow outlives every use of the span in these tests.
        unsafe { iommu.grant(addr, len) };
        iommu.span(addr, len).unwrap()
    }

    #[test]
    fn a_span_reaches_only_what_was_granted() {
        let mut words = [0_u64; 8];
        let mut iommu = Iommu::default();
        let addr = words.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: `words` outlives the grant.
        let id = unsafe { iommu.grant(addr, 64) };
        assert!(iommu.span(addr, 64).is_some());
        assert!(iommu.span(addr + 8, 56).is_some());
        assert!(iommu.span(addr + 8, 57).is_none());
        assert!(iommu.span(addr - 1, 1).is_none());
        assert!(iommu.span(u64::MAX, 2).is_none());
        assert_eq!(iommu.span_up_to(addr + 8, 4096).unwrap().len(), 56);
        assert!(iommu.span_up_to(addr + 64, 1).is_none());
        iommu.revoke(id);
        assert!(iommu.span(addr, 1).is_none());
    }

    #[test]
    #[should_panic(expected = "DMA outside its span")]
    fn an_access_outside_its_span_panics() {
        let mut words = [0_u64; 2];
        granted(&mut words).write(12, &[0; 5]);
    }

    #[test]
    fn bytes_arrive_at_any_alignment_and_overlap_is_moved() {
        let mut words = [0_u64; 4];
        let span = granted(&mut words);
        span.write(3, &[1, 2, 3, 4, 5]);
        span.write(8, &7_u64.to_le_bytes());
        let mut out = [0; 16];
        span.read(0, &mut out);
        assert_eq!(out, [0, 0, 0, 1, 2, 3, 4, 5, 7, 0, 0, 0, 0, 0, 0, 0]);
        span.copy_from(1, span, 0, 15);
        let mut moved = [0; 15];
        span.read(1, &mut moved);
        assert_eq!(moved, out[..15]);
    }

    #[test]
    fn atomics_change_one_word_and_return_the_old_one() {
        let mut words = [5_u64, 0];
        let span = granted(&mut words);
        assert_eq!(span.update64(0, |old| old + 2), 5);
        assert_eq!(span.load64(0, Ordering::Acquire), 7);
        assert_eq!(span.update32(8, |old| old ^ 3), 0);
        assert_eq!(span.load32(8, Ordering::Acquire), 3);
    }

    /// Memory that is nobody's address.
    struct Far(parking_lot::Mutex<Vec<u8>>);

    impl crate::bus::Bus for Far {
        fn read(&self, addr: u64, bytes: &mut [u8]) -> bool {
            bytes.copy_from_slice(&self.0.lock()[addr as usize..][..bytes.len()]);
            true
        }

        fn write(&self, addr: u64, bytes: &[u8]) -> bool {
            self.0.lock()[addr as usize..][..bytes.len()].copy_from_slice(bytes);
            true
        }
    }

    #[test]
    fn memory_on_a_bus_is_reached_by_every_kind_of_access_and_never_as_a_pointer() {
        let far: std::sync::Arc<dyn crate::bus::Bus> =
            std::sync::Arc::new(Far(parking_lot::Mutex::new(vec![0; 100_000])));
        let bus = crate::bus::attach(std::sync::Arc::downgrade(&far)).unwrap();
        let mut iommu = Iommu::default();
        let (id, addr) = iommu.grant_copied(bus, 8, 99_992).unwrap();
        let span = iommu.span(addr, 99_992).unwrap();
        assert!(iommu.span(addr, 99_993).is_none() && iommu.span(8, 8).is_none());
        span.store32(0, 5, Ordering::Release);
        span.store64(8, 6, Ordering::Release);
        assert_eq!((span.load32(0, Ordering::Acquire), span.load64(8, Ordering::Acquire)), (5, 6));
        assert_eq!((span.update32(0, |old| old + 1), span.update64(8, |old| old * 7)), (5, 6));
        assert_eq!((span.load32(0, Ordering::Acquire), span.load64(8, Ordering::Acquire)), (6, 42));
        span.prefetch(0);
        let mut words: Vec<u64> = (0..6000).collect();
        let near = granted(&mut words);
        // There and back, in more than one piece, at no alignment.
        span.copy_from(21, near, 3, 40_000);
        near.copy_from(0, span, 21, 40_000);
        let mut bytes = [0; 16];
        near.read(5, &mut bytes);
        assert_eq!(bytes, [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        span.copy_from(60_000, span, 21, 100);
        let mut block = [0; 64];
        span.read_block(60_005, &mut block);
        assert_eq!(block[..8], 1_u64.to_le_bytes());
        assert!(iommu.grant_copied(bus, COPIED_END - 1, 2).is_none());
        iommu.revoke(id);
        assert!(iommu.span(addr, 1).is_none());
    }

    #[test]
    fn a_descriptor_is_mapped_with_its_offset() {
        // SAFETY: plain system calls on a descriptor that this test owns.
        let fd = unsafe { libc::memfd_create(c"ibex-test".as_ptr(), 0) };
        assert!(fd >= 0);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::ftruncate(fd, 8192) }, 0);
        let mut iommu = Iommu::default();
        let (id, addr) = iommu.map(fd, 100, 64).unwrap();
        iommu.span(addr, 64).unwrap().write(0, b"through the window");
        let mut back = [0_u8; 18];
        // SAFETY: reads into a buffer of that length.
        let read = unsafe { libc::pread(fd, back.as_mut_ptr().cast(), 18, 100) };
        assert_eq!((read, &back), (18, b"through the window"));
        iommu.revoke(id);
        assert!(iommu.span(addr, 1).is_none());
        assert_eq!(iommu.map(-1, 0, 64).unwrap_err().errno, libc::EBADF);
        // SAFETY: closes our descriptor once.
        unsafe { libc::close(fd) };
    }
}
