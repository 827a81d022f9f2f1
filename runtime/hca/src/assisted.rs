//! Host-assisted doorbells, for machines where GPUs cannot reach the NIC's doorbell pages.
//!
//! [`AssistedHca`] is a device made of another: whoever asks for a doorbell page gets a page of ordinary host memory
//! instead, and the host carries what is stored there to the device's own page. Kernels are the same: they store eight
//! bytes to the register that their context names. It costs one more hop per doorbell, and a core that polls.
//!
//! *Who owns what.* The wrapper owns the memory of all pages, which never moves, and the device's pages behind those
//! that are in use. A [`Forwarder`] owns its thread.
//!
//! INVARIANT: a register holds `EMPTY`, or the last value stored since it was last carried; nothing is carried twice.
//! INVARIANT: what stands in a page that is free is never carried: a late doorbell is harmless here too.
#![expect(unsafe_code, reason = "passes the unsafe methods of the trait on")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use ibex_abi::doorbell::UAR_BLUE_FLAME_OFFSET;
use ibex_abi::eqe::{UAR_CQ_ARM_OFFSET, UAR_EQ_ARM_OFFSET, UAR_EQ_UPDATE_OFFSET};
use ibex_abi::types::{Eqn, Iova, Pd};
use parking_lot::RwLock;

use crate::host_memory::HostMemory;
use crate::register::Registers;
use crate::{
    Access, AsyncEvent, CommandError, DoorbellPage, Hca, HcaCaps, HcaError, MemoryRegion, Mkey, Path,
    PortAddress, PortInfo, Umem,
};

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Most pages of one device.
pub const PAGES_MAX: u32 = 4096;
/// Nothing was stored. No doorbell, and no request to arm a queue, is all ones: their reserved bits are zero.
const EMPTY: u64 = u64::MAX;
const EMPTY_HALF: u32 = u32::MAX;
/// Registers of eight bytes: send doorbells, requests to arm completion queues.
const WIDE: [usize; 2] = [UAR_BLUE_FLAME_OFFSET, UAR_CQ_ARM_OFFSET];
/// Registers of four bytes, of event queues.
const NARROW: [usize; 2] = [UAR_EQ_UPDATE_OFFSET, UAR_EQ_ARM_OFFSET];
/// Rounds without news after which the thread lets others run.
const ROUNDS_BEFORE_YIELD: u32 = 64;

/// A device whose doorbell pages are host memory.
#[derive(Debug)]
pub struct AssistedHca<H: ?Sized> {
    /// One page after the other.
    memory: HostMemory,
    /// The device's page behind each page in use. Carrying reads it; taking and giving back writes it.
    pages: RwLock<Vec<Option<DoorbellPage>>>,
    inner: Arc<H>,
}

impl<H: Hca + ?Sized> AssistedHca<H> {
    /// Wraps a device; at most `max_pages` doorbell pages will be in use at a time.
    ///
    /// # Errors
    /// A number of pages outside 1..=[`PAGES_MAX`].
    pub fn new(inner: Arc<H>, max_pages: u32) -> Result<Arc<Self>, HcaError> {
        if !(1..=PAGES_MAX).contains(&max_pages) {
            let (field, value, max) = ("max_pages", max_pages.into(), PAGES_MAX.into());
            return Err(HcaError::OutOfRange { field, value, min: 1, max });
        }
        let memory = HostMemory::new(u64::from(max_pages) * PAGE)?;
        // CAST: at most PAGES_MAX.
        let pages = RwLock::new(vec![None; max_pages as usize]);
        Ok(Arc::new(Self { memory, pages, inner }))
    }

    /// The device inside.
    #[must_use]
    pub const fn inner(&self) -> &Arc<H> {
        &self.inner
    }

    /// The memory of all pages: what must be mapped into a GPU whose kernels ring, at the same addresses.
    #[must_use]
    pub fn memory(&self) -> MemoryRegion {
        self.memory.region()
    }

    /// Carries what was stored since the last call to the device; whether anything was.
    ///
    /// ORDER(3): doorbell record -> doorbell. The acquire here pairs with the kernel's release store, and the store to
    /// the device is a release again, so the device sees the record that the doorbell speaks of.
    pub fn forward(&self) -> bool {
        let mut carried = false;
        for (idx, page) in self.pages.read().iter().enumerate() {
            let Some(page) = page else { continue };
            let (view, registers) = (self.memory.view(), Registers::of(page));
            let at = |offset: usize| idx as u64 * PAGE + offset as u64;
            for offset in WIDE {
                let value = take(
                    EMPTY,
                    || view.word64(at(offset)).load(Ordering::Relaxed),
                    || view.word64(at(offset)).swap(EMPTY, Ordering::AcqRel),
                );
                carried |= value.is_some();
                match value {
                    Some(value) if offset == UAR_BLUE_FLAME_OFFSET => registers.ring_value(value),
                    Some(value) => registers.store64(offset, value),
                    None => {}
                }
            }
            for offset in NARROW {
                let value = take(
                    EMPTY_HALF,
                    || view.word32(at(offset)).load(Ordering::Relaxed),
                    || view.word32(at(offset)).swap(EMPTY_HALF, Ordering::AcqRel),
                );
                carried |= value.is_some();
                value.into_iter().for_each(|value| registers.store32(offset, value));
            }
        }
        carried
    }

    /// Starts a thread that carries until the [`Forwarder`] is dropped.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn spawn(self: &Arc<Self>) -> Result<Forwarder, io::Error>
    where
        H: 'static,
    {
        let (stop, device) = (Arc::new(AtomicBool::new(false)), Arc::clone(self));
        let until = Arc::clone(&stop);
        let thread = thread::Builder::new().name("ibex-doorbells".into()).spawn(move || {
            let mut idle = 0;
            while !until.load(Ordering::Relaxed) {
                idle = if device.forward() { 0 } else { idle + 1 };
                if idle >= ROUNDS_BEFORE_YIELD {
                    thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
            }
            // What was stored before the end was asked for is carried.
            device.forward();
        })?;
        Ok(Forwarder { stop, thread: Some(thread) })
    }

    /// The page with this number of ours, from the device's.
    fn shadow(&self, idx: usize, page: &DoorbellPage) -> DoorbellPage {
        let register = self.memory.view().addr(idx as u64 * PAGE + UAR_BLUE_FLAME_OFFSET as u64);
        DoorbellPage { uar: page.uar, register }
    }

    fn clear(&self, idx: usize) {
        let (view, base) = (self.memory.view(), idx as u64 * PAGE);
        WIDE.iter().for_each(|at| view.word64(base + *at as u64).store(EMPTY, Ordering::Release));
        NARROW.iter().for_each(|at| view.word32(base + *at as u64).store(EMPTY_HALF, Ordering::Release));
    }
}

/// Takes a register's value, if there is one. Reading first leaves the line to whoever rings while nobody does.
fn take<T: PartialEq + Copy>(empty: T, look: impl Fn() -> T, swap: impl Fn() -> T) -> Option<T> {
    if look() == empty {
        return None;
    }
    Some(swap()).filter(|value| *value != empty)
}

/// The thread that carries doorbells; it ends when this is dropped.
#[derive(Debug)]
pub struct Forwarder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, there is nothing left to stop.
            let _ = thread.join();
        }
    }
}

impl<H: Hca + ?Sized> Hca for AssistedHca<H> {
    fn alloc_doorbell(&self) -> Result<DoorbellPage, HcaError> {
        let mut pages = self.pages.write();
        let limit = pages.len() as u64;
        let Some(idx) = pages.iter().position(Option::is_none) else {
            return Err(HcaError::Exhausted { what: "doorbell pages", requested: 1, limit });
        };
        let page = self.inner.alloc_doorbell()?;
        self.clear(idx);
        pages[idx] = Some(page);
        Ok(self.shadow(idx, &page))
    }

    fn free_doorbell(&self, page: DoorbellPage) -> Result<(), HcaError> {
        let mut pages = self.pages.write();
        // Several registers may lie on one page of the device; a caller that knows only its number gives no register.
        let is_it = |(idx, held): (usize, &Option<DoorbellPage>)| {
            let held = held.as_ref().filter(|held| held.uar == page.uar);
            held.is_some_and(|held| page.register == 0 || self.shadow(idx, held).register == page.register)
        };
        let found = pages.iter().enumerate().position(is_it);
        // The device knows best what to say of a page that it never gave.
        let Some(idx) = found else { return self.inner.free_doorbell(page) };
        if let Some(held) = pages[idx] {
            self.inner.free_doorbell(held)?;
        }
        pages[idx] = None;
        Ok(())
    }

    fn caps(&self) -> &HcaCaps {
        self.inner.caps()
    }

    fn port(&self) -> PortInfo {
        self.inner.port()
    }

    fn alloc_pd(&self) -> Result<Pd, HcaError> {
        self.inner.alloc_pd()
    }

    fn dealloc_pd(&self, pd: Pd) -> Result<(), HcaError> {
        self.inner.dealloc_pd(pd)
    }

    unsafe fn register(
        &self,
        pd: Pd,
        mem: MemoryRegion,
        iova: Iova,
        access: Access,
    ) -> Result<Mkey, HcaError> {
        // SAFETY: the caller's contract is the same.
        unsafe { self.inner.register(pd, mem, iova, access) }
    }

    fn deregister(&self, key: Mkey) -> Result<(), HcaError> {
        self.inner.deregister(key)
    }

    unsafe fn create_umem(&self, mem: MemoryRegion) -> Result<Umem, HcaError> {
        // SAFETY: the caller's contract is the same.
        unsafe { self.inner.create_umem(mem) }
    }

    fn destroy_umem(&self, umem: Umem) -> Result<(), HcaError> {
        self.inner.destroy_umem(umem)
    }

    fn eqn(&self, vector: u32) -> Result<Eqn, HcaError> {
        self.inner.eqn(vector)
    }

    fn resolve(&self, remote: &PortAddress) -> Result<Path, HcaError> {
        self.inner.resolve(remote)
    }

    fn pkey_index(&self) -> u16 {
        self.inner.pkey_index()
    }

    fn exec(&self, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        // A command finds the doorbells that were rung before it.
        self.forward();
        self.inner.exec(input, output)
    }

    fn poll_async_event(&self) -> Option<AsyncEvent> {
        self.inner.poll_async_event()
    }

    fn is_on_bus(&self) -> bool {
        self.inner.is_on_bus()
    }

    fn unrung_wqes(&self) -> Option<u64> {
        self.forward();
        self.inner.unrung_wqes()
    }
}
