//! Registers of a doorbell page, as the host stores to them.
//!
//! Nothing is owned: the page is the device's. Every store is one instruction, of the size that the device reads.
#![expect(unsafe_code, reason = "stores to the registers of a page that the device has mapped")]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ibex_abi::doorbell::{Doorbell, UAR_BLUE_FLAME_OFFSET};
use ibex_abi::eqe::{CqArm, EqDoorbell, UAR_CQ_ARM_OFFSET, UAR_EQ_ARM_OFFSET, UAR_EQ_UPDATE_OFFSET};

use crate::DoorbellPage;

/// The registers of one page.
///
/// INVARIANT: made from a page that the device allocated for the holder, which keeps the device alive.
#[derive(Debug)]
pub(crate) struct Registers {
    page: u64,
}

impl Registers {
    pub(crate) const fn of(page: &DoorbellPage) -> Self {
        Self { page: page.register - UAR_BLUE_FLAME_OFFSET as u64 }
    }

    /// ORDER(3): doorbell record -> doorbell. A release store; the device's acquire load pairs with it.
    pub(crate) fn ring(&self, doorbell: Doorbell) {
        self.store64(UAR_BLUE_FLAME_OFFSET, doorbell.to_register());
    }

    /// Arms a completion queue, whose record says so already.
    pub(crate) fn arm_cq(&self, arm: CqArm) {
        self.store64(UAR_CQ_ARM_OFFSET, u64::from_ne_bytes(arm.to_bytes()));
    }

    /// Moves an event queue's consumer index, and arms it on request.
    pub(crate) fn update_eq(&self, doorbell: EqDoorbell, arm: bool) {
        let offset = if arm { UAR_EQ_ARM_OFFSET } else { UAR_EQ_UPDATE_OFFSET };
        // CAST: an address of this process.
        let word = std::ptr::with_exposed_provenance_mut::<u32>(self.page as usize + offset);
        let value = u32::from_ne_bytes(doorbell.to_bytes());
        // SAFETY: a live, aligned register (see the invariant), written by single 4-byte stores only.
        unsafe { AtomicU32::from_ptr(word) }.store(value, Ordering::Release);
    }

    fn store64(&self, offset: usize, value: u64) {
        // CAST: an address of this process.
        let word = std::ptr::with_exposed_provenance_mut::<u64>(self.page as usize + offset);
        // SAFETY: a live, aligned register (see the invariant), written by single 8-byte stores only.
        unsafe { AtomicU64::from_ptr(word) }.store(value, Ordering::Release);
    }
}
