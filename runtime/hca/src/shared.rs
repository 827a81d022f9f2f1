//! One device for several users of one process, each of which hears of everything that the device reports.
//!
//! A device's events are taken by whoever asks first. Ranks that share a NIC would take each other's, so each gets a
//! [`SharedHca`], which passes every call on and keeps events until its own user asks.
//!
//! *Who owns what.* All users of a device share it and the queues of what each has not taken yet.
//!
//! INVARIANT: every event of the device reaches every user, in order; a user that never asks loses its oldest.
#![expect(unsafe_code, reason = "passes the unsafe methods of the trait on")]

use std::collections::VecDeque;
use std::sync::Arc;

use ibex_abi::types::{Eqn, Iova, Pd};
use parking_lot::Mutex;

use crate::{
    Access, AsyncEvent, CommandError, DoorbellPage, Hca, HcaCaps, HcaError, MemoryRegion, Mkey, Path,
    PortAddress, PortInfo, Umem,
};

/// Most events that wait for one user; a user that asks seldom loses the oldest.
pub const WAITING_MAX: usize = 1024;

/// What waits for each user.
type Waiting = Mutex<Vec<VecDeque<AsyncEvent>>>;

/// One user's view of a device.
#[derive(Debug)]
pub struct SharedHca<H: ?Sized> {
    user: usize,
    waiting: Arc<Waiting>,
    inner: Arc<H>,
}

impl<H: Hca + ?Sized> SharedHca<H> {
    /// As many views of one device as there are users of it.
    #[must_use]
    pub fn split(inner: &Arc<H>, users: usize) -> Vec<Arc<Self>> {
        let waiting: Arc<Waiting> = Arc::new(Mutex::new(vec![VecDeque::new(); users]));
        let view = |user| Self { user, waiting: Arc::clone(&waiting), inner: Arc::clone(inner) };
        (0..users).map(|user| Arc::new(view(user))).collect()
    }

    /// The device itself.
    #[must_use]
    pub const fn inner(&self) -> &Arc<H> {
        &self.inner
    }
}

impl<H: Hca + ?Sized> Hca for SharedHca<H> {
    fn poll_async_event(&self) -> Option<AsyncEvent> {
        let mut waiting = self.waiting.lock();
        // Bounded, so that a device that never stops reporting keeps nobody here.
        for _ in 0..WAITING_MAX {
            let Some(event) = self.inner.poll_async_event() else { break };
            for queue in waiting.iter_mut() {
                if queue.len() == WAITING_MAX {
                    queue.pop_front();
                }
                queue.push_back(event);
            }
        }
        waiting[self.user].pop_front()
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

    fn alloc_doorbell(&self) -> Result<DoorbellPage, HcaError> {
        self.inner.alloc_doorbell()
    }

    fn free_doorbell(&self, page: DoorbellPage) -> Result<(), HcaError> {
        self.inner.free_doorbell(page)
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
        self.inner.exec(input, output)
    }

    fn doorbells_are_registers(&self) -> bool {
        self.inner.doorbells_are_registers()
    }

    fn is_on_bus(&self) -> bool {
        self.inner.is_on_bus()
    }

    fn unrung_wqes(&self) -> Option<u64> {
        self.inner.unrung_wqes()
    }
}
