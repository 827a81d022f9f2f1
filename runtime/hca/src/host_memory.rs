//! Host memory that a device shares, and safe access to it.
//!
//! *Who owns what.* [`HostMemory`] owns a page-aligned allocation; [`Registered`] owns it together with a
//! key and gives the key back before the memory. A [`View`] borrows either.
//!
//! Devices and kernels read and write the same bytes at the same time, so there is no slice here: words
//! are atomics, bulk access copies through relaxed atomics, and nothing hands out a reference.
#![expect(unsafe_code, reason = "atomic access to memory that a device shares")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use ibex_abi::types::{Iova, Pd};
use parking_lot::Mutex;

use crate::{Access, Hca, HcaError, MemoryRegion, Mkey};

/// Alignment of allocations: a page, as registration wants it.
const PAGE: usize = 4096;

/// Zeroed, page-aligned memory.
#[derive(Debug)]
pub struct HostMemory {
    base: NonNull<u8>,
    layout: Layout,
    len: u64,
}

// SAFETY: an owned allocation whose bytes are accessed by atomics only.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Allocates `len` bytes.
    ///
    /// # Errors
    /// [`HcaError::OutOfRange`] for a length of zero or above what can be addressed.
    pub fn new(len: u64) -> Result<Self, HcaError> {
        let max = i64::MAX as u64 - PAGE as u64;
        let refused = HcaError::OutOfRange { field: "memory length", value: len, min: 1, max };
        let size = usize::try_from(len).map_err(|_| refused)?;
        let layout = Layout::from_size_align(size, PAGE).map_err(|_| refused)?;
        if size == 0 {
            return Err(refused);
        }
        // SAFETY: the layout has a size other than zero.
        let base = unsafe { alloc_zeroed(layout) };
        match NonNull::new(base) {
            Some(base) => Ok(Self { base, layout, len }),
            None => handle_alloc_error(layout),
        }
    }

    /// Access to the bytes.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        View { base: self.base.as_ptr(), len: self.len, _owner: PhantomData }
    }

    /// The region to register.
    #[must_use]
    pub fn region(&self) -> MemoryRegion {
        MemoryRegion::host(self.base.as_ptr(), self.len)
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// Borrowed access to shared memory, by offset.
///
/// # Panics
/// PANIC: every access asserts that it is in bounds, and words that they are aligned.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    base: *mut u8,
    len: u64,
    _owner: PhantomData<&'a HostMemory>,
}

// SAFETY: all access is atomic.
unsafe impl Send for View<'_> {}
// SAFETY: as above.
unsafe impl Sync for View<'_> {}

impl View<'_> {
    /// A view of memory that someone else owns.
    ///
    /// # Safety
    /// `[base, base + len)` stays valid for the view's lifetime, and whoever else accesses it does so
    /// atomically or as a device.
    #[must_use]
    pub const unsafe fn from_raw(base: *mut u8, len: u64) -> Self {
        Self { base, len, _owner: PhantomData }
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the byte at `offset`.
    #[must_use]
    pub fn addr(&self, offset: u64) -> u64 {
        self.base.expose_provenance() as u64 + offset
    }

    /// The part `[offset, offset + len)`.
    #[must_use]
    pub fn part(&self, offset: u64, len: u64) -> Self {
        let base = self.at(offset, len);
        Self { base, len, _owner: PhantomData }
    }

    fn at(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset, "access outside the view");
        // CAST: in bounds of an allocation, as asserted.
        self.base.wrapping_add(offset as usize)
    }

    /// The 4-byte word at `offset`.
    #[must_use]
    pub fn word32(&self, offset: u64) -> &AtomicU32 {
        let word = self.at(offset, 4).cast::<u32>();
        assert!(word.is_aligned(), "unaligned word");
        // SAFETY: in bounds and aligned, valid while the owner is borrowed.
        unsafe { AtomicU32::from_ptr(word) }
    }

    /// The 8-byte word at `offset`.
    #[must_use]
    pub fn word64(&self, offset: u64) -> &AtomicU64 {
        let word = self.at(offset, 8).cast::<u64>();
        assert!(word.is_aligned(), "unaligned word");
        // SAFETY: as for `word32`.
        unsafe { AtomicU64::from_ptr(word) }
    }

    fn byte(&self, offset: u64) -> &AtomicU8 {
        // SAFETY: in bounds, as `at` asserts.
        unsafe { AtomicU8::from_ptr(self.at(offset, 1)) }
    }

    /// Copies bytes in, one by one; order among them is not promised.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        for (at, byte) in (offset..).zip(bytes) {
            self.byte(at).store(*byte, Ordering::Relaxed);
        }
    }

    /// Copies bytes out, one by one.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        for (at, byte) in (offset..).zip(out) {
            *byte = self.byte(at).load(Ordering::Relaxed);
        }
    }

    /// Copies `len` bytes out.
    #[must_use]
    pub fn to_vec(&self, offset: u64, len: u64) -> Vec<u8> {
        assert!(offset <= self.len && len <= self.len - offset, "access outside the view");
        // CAST: in bounds of an allocation.
        let mut out = vec![0; len as usize];
        self.read(offset, &mut out);
        out
    }

    /// Sets every byte to `value`.
    pub fn fill(&self, value: u8) {
        for at in 0..self.len {
            self.byte(at).store(value, Ordering::Relaxed);
        }
    }
}

/// Host memory registered for the data path.
pub struct Registered {
    hca: Arc<dyn Hca>,
    /// `None` once leaked, because the device would not give the key back.
    memory: Option<HostMemory>,
    key: Mkey,
    /// The device has given the key back.
    revoked: Mutex<bool>,
}

impl Registered {
    /// Allocates `len` bytes and registers them at their own address.
    ///
    /// # Errors
    /// As [`HostMemory::new`] and [`Hca::register`].
    pub fn new(hca: &Arc<dyn Hca>, pd: Pd, len: u64, access: Access) -> Result<Self, HcaError> {
        let memory = HostMemory::new(len)?;
        let iova = Iova(memory.view().addr(0));
        // SAFETY: the allocation is accessed by atomics only and lives until `drop`, which deregisters
        // it first.
        let key = unsafe { hca.register(pd, memory.region(), iova, access) }?;
        Ok(Self { hca: Arc::clone(hca), memory: Some(memory), key, revoked: Mutex::new(false) })
    }

    /// Gives the key back before the memory: when this returns no device touches the memory through it any
    /// more. A second call does nothing.
    ///
    /// # Errors
    /// The device's refusal; the key is then as good as before, and this may be tried again.
    pub fn revoke(&self) -> Result<(), HcaError> {
        let mut revoked = self.revoked.lock();
        if !*revoked {
            self.hca.deregister(self.key)?;
            *revoked = true;
        }
        Ok(())
    }

    /// The key.
    #[must_use]
    pub const fn key(&self) -> &Mkey {
        &self.key
    }

    /// Address of the byte at `offset`, as WQEs name it.
    #[must_use]
    pub const fn iova(&self, offset: u64) -> u64 {
        self.key.iova.get() + offset
    }

    /// Access to the bytes.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        // PANIC: `memory` is taken only in `drop`.
        self.memory.as_ref().expect("memory is present until drop").view()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.revoke().is_err() {
            // The device may still write there: better lost than reused.
            std::mem::forget(self.memory.take());
        }
    }
}

impl std::fmt::Debug for Registered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registered").field("key", &self.key).finish_non_exhaustive()
    }
}
