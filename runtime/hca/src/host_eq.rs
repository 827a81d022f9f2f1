//! An event queue that the host reads.
//!
//! *Who owns what.* A [`HostEq`] owns the event queue object, its doorbell page and the piece of a control region that
//! holds the ring; it destroys the object before it gives the bytes back, or keeps them for ever.
//!
//! INVARIANT: an entry is read only after an acquire load has shown that the device wrote its last word.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ibex_abi::eqe::{
    EQE, EQE_OWNER_INIT, EQE_OWNER_WORD_OFFSET, EqDoorbell, Eqe, Event, EventType, UnknownEvent, eqe_owner,
};
use ibex_abi::types::Eqn;
use zerocopy::FromBytes;

use crate::control_region::{Carved, ControlError, ControlRegion};
use crate::objects::{self, EqInfo, EqSpec};
use crate::register::Registers;
use crate::{DoorbellPage, Hca, HcaError, destroyed};

/// Rings lie on pages.
const RING_ALIGN: u64 = 4096;

/// An event queue and the host's position in it.
pub struct HostEq {
    hca: Arc<dyn Hca>,
    eqn: Option<Eqn>,
    page: DoorbellPage,
    registers: Registers,
    ring: Carved,
    log_size: u8,
    consumed: u32,
}

impl HostEq {
    /// Creates a queue of `1 << log_size` entries that takes asynchronous events of these types, beside the completion
    /// events of every completion queue that names it.
    ///
    /// # Errors
    /// A region without room; the device's refusal, `BAD_OP` where it leaves event queues to
    /// its kernel driver.
    pub fn create(region: &ControlRegion, log_size: u8, events: &[EventType]) -> Result<Self, ControlError> {
        let hca = Arc::clone(region.hca());
        let ring = region.carve((EQE as u64) << log_size, RING_ALIGN)?;
        let page = hca.alloc_doorbell()?;
        let registers = Registers::of(&page);
        let mut eq = Self { hca, eqn: None, page, registers, ring, log_size, consumed: 0 };
        eq.clear();
        let events = events.iter().fold(0, |mask, event| mask | event.bit());
        let spec = EqSpec { uar: page.uar, log_size, addr: eq.ring.addr(), events };
        eq.eqn = Some(objects::create_eq(&*eq.hca, &spec)?);
        Ok(eq)
    }

    /// Its number, for [`CqSpec`](objects::CqSpec).
    ///
    /// # Panics
    /// PANIC: a queue that exists has a number; it loses it only when it is destroyed.
    #[must_use]
    pub fn eqn(&self) -> Eqn {
        self.eqn.expect("the queue exists")
    }

    fn clear(&mut self) {
        let owner = u32::from_ne_bytes([0, 0, 0, EQE_OWNER_INIT]);
        if let Some(ring) = self.ring.view() {
            for entry in 0..1_u64 << self.log_size {
                ring.word32(entry * EQE as u64 + EQE_OWNER_WORD_OFFSET as u64)
                    .store(owner, Ordering::Release);
            }
        }
    }

    /// The next event, if there is one.
    ///
    /// ORDER(18): entry -> its last word. The acquire load pairs with the device's release store.
    ///
    /// # Errors
    /// The type of an event that this crate does not know; it is consumed.
    pub fn poll(&mut self) -> Result<Option<Event>, UnknownEvent> {
        let Some(ring) = self.ring.view() else { return Ok(None) };
        let at = u64::from(self.consumed & ((1 << self.log_size) - 1)) * EQE as u64;
        let word = ring.word32(at + EQE_OWNER_WORD_OFFSET as u64).load(Ordering::Acquire);
        let [.., owner] = word.to_ne_bytes();
        if (owner & 1 == 1) != eqe_owner(self.consumed, self.log_size) {
            return Ok(None);
        }
        let mut bytes = [0; EQE];
        ring.read(at, &mut bytes);
        self.consumed = self.consumed.wrapping_add(1);
        let Ok(eqe) = Eqe::read_from_bytes(&bytes) else { return Ok(None) };
        eqe.event().map(Some)
    }

    /// Tells the device how far events are consumed, and on request to raise its interrupt at the next one.
    pub fn update(&self, arm: bool) {
        if let Some(eqn) = self.eqn {
            self.registers.update_eq(EqDoorbell { eqn, ci: self.consumed & 0xff_ffff }, arm);
        }
    }

    /// What the device says of it.
    ///
    /// # Errors
    /// The device's refusal.
    pub fn query(&self) -> Result<EqInfo, HcaError> {
        objects::query_eq(&*self.hca, self.eqn())
    }

    /// Destroys it and gives its doorbell page back.
    ///
    /// # Errors
    /// `RES_BUSY` while a completion queue names it. A retry goes on where this stopped.
    pub fn destroy(&mut self) -> Result<(), HcaError> {
        if let Some(eqn) = self.eqn {
            destroyed(objects::destroy_eq(&*self.hca, eqn))?;
            self.eqn = None;
        }
        destroyed(self.hca.free_doorbell(self.page))
    }
}

impl Drop for HostEq {
    fn drop(&mut self) {
        if self.destroy().is_err() && self.eqn.is_some() {
            // The device may still write there.
            self.ring.leak();
        }
    }
}

impl std::fmt::Debug for HostEq {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (eqn, consumed) = (self.eqn, self.consumed);
        f.debug_struct("HostEq").field("eqn", &eqn).field("consumed", &consumed).finish_non_exhaustive()
    }
}
