//! Registers of a doorbell page, as the host stores to them.
//!
//! Nothing is owned: the page is the device's. Every store is one instruction, of the size that the device reads.
#![expect(unsafe_code, reason = "stores to the registers of a page that the device has mapped")]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ibex_abi::doorbell::Doorbell;
use ibex_abi::eqe::{CqArm, EqDoorbell, UAR_CQ_ARM_OFFSET, UAR_EQ_ARM_OFFSET, UAR_EQ_UPDATE_OFFSET};

use crate::DoorbellPage;

/// Bytes of a page.
const UAR_PAGE: u64 = 4096;

/// The registers of one page.
///
/// INVARIANT: made from a page that the device allocated for the holder, which keeps the device alive.
#[derive(Debug)]
pub(crate) struct Registers {
    page: u64,
    /// Offset of the doorbell register: a page may have several, of several holders.
    doorbell: usize,
}

impl Registers {
    pub(crate) const fn of(page: &DoorbellPage) -> Self {
        let base = page.register & !(UAR_PAGE - 1);
        // CAST: below the size of a page.
        Self { page: base, doorbell: (page.register - base) as usize }
    }

    /// ORDER(3): doorbell record -> doorbell. A release store; the device's acquire load pairs with it.
    pub(crate) fn ring(&self, doorbell: Doorbell) {
        self.ring_value(doorbell.to_register());
    }

    /// The same, for a value that somebody else stored.
    pub(crate) fn ring_value(&self, value: u64) {
        self.store64(self.doorbell, value);
    }

    /// Arms a completion queue, whose record says so already.
    pub(crate) fn arm_cq(&self, arm: CqArm) {
        self.store64(UAR_CQ_ARM_OFFSET, u64::from_ne_bytes(arm.to_bytes()));
    }

    /// Moves an event queue's consumer index, and arms it on request.
    pub(crate) fn update_eq(&self, doorbell: EqDoorbell, arm: bool) {
        let offset = if arm { UAR_EQ_ARM_OFFSET } else { UAR_EQ_UPDATE_OFFSET };
        self.store32(offset, u32::from_ne_bytes(doorbell.to_bytes()));
    }

    /// Stores to the register at this offset of the page.
    pub(crate) fn store32(&self, offset: usize, value: u32) {
        // CAST: an address of this process.
        let word = std::ptr::with_exposed_provenance_mut::<u32>(self.page as usize + offset);
        // SAFETY: a live, aligned register (see the invariant), written by single 4-byte stores only.
        unsafe { AtomicU32::from_ptr(word) }.store(value, Ordering::Release);
    }

    /// Stores to the register at this offset of the page.
    pub(crate) fn store64(&self, offset: usize, value: u64) {
        // CAST: an address of this process.
        let word = std::ptr::with_exposed_provenance_mut::<u64>(self.page as usize + offset);
        // SAFETY: a live, aligned register (see the invariant), written by single 8-byte stores only.
        unsafe { AtomicU64::from_ptr(word) }.store(value, Ordering::Release);
    }
}
