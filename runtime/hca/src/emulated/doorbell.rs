//! Doorbell registers: the only way a strict device learns of work.
//!
//! *Who owns what.* Pages belong to the device and are never unmapped while it lives, so a late store is
//! harmless. A register is a word of memory that remembers its last value only: give each queue pair a
//! page of its own, or a doorbell may overwrite one that was not yet seen.
//!
//! ORDER(3): doorbell record -> doorbell. The acquire load here pairs with the release (or MMIO) store of
//! whoever rings; the record is read after it and must not be behind.

use std::sync::atomic::{AtomicU64, Ordering};

use ibex_abi::doorbell::{Doorbell, UAR_BLUE_FLAME_OFFSET};
use ibex_abi::eqe::{UAR_CQ_ARM_OFFSET, UAR_EQ_ARM_OFFSET, UAR_EQ_UPDATE_OFFSET};
use ibex_abi::types::UarIdx;

use super::memory::OwnPage;

/// The two halves of the first BlueFlame register, which libmlx5 uses in turn.
const REGISTERS: [u64; 2] = [UAR_BLUE_FLAME_OFFSET as u64, UAR_BLUE_FLAME_OFFSET as u64 + 0x100];

/// One user access region.
#[derive(Debug)]
pub(super) struct Uar {
    pub(super) idx: UarIdx,
    page: OwnPage,
    seen: [AtomicU64; 2],
    /// As `seen`: the registers that arm a completion queue, arm an event queue, and update one.
    events_seen: [AtomicU64; 3],
}

impl Uar {
    pub(super) fn new(idx: UarIdx) -> Self {
        Self { idx, page: OwnPage::new(), seen: Default::default(), events_seen: Default::default() }
    }

    /// Address of the register that drivers store to.
    pub(super) fn register(&self) -> u64 {
        self.page.span().addr() + REGISTERS[0]
    }

    /// Whether a register changed since the last poll.
    pub(super) fn has_news(&self) -> bool {
        let page = self.page.span();
        let mut pairs = REGISTERS.into_iter().zip(&self.seen);
        pairs.any(|(at, seen)| page.load64(at, Ordering::Acquire) != seen.load(Ordering::Relaxed))
    }

    /// Calls `ring` for each register that changed since the last poll.
    pub(super) fn poll(&self, mut ring: impl FnMut(Doorbell)) {
        for (offset, seen) in REGISTERS.into_iter().zip(&self.seen) {
            let value = self.page.span().load64(offset, Ordering::Acquire);
            if seen.load(Ordering::Relaxed) != value {
                seen.store(value, Ordering::Relaxed);
                ring(Doorbell::from_register(value));
            }
        }
    }

    /// The last request to arm a completion queue, if it is new. Like every register, it shows the last value only.
    pub(super) fn take_arm(&self) -> Option<[u8; 8]> {
        let value = self.page.span().load64(UAR_CQ_ARM_OFFSET as u64, Ordering::Acquire);
        (self.events_seen[0].swap(value, Ordering::Relaxed) != value).then(|| value.to_ne_bytes())
    }

    /// Calls `take` for each of the two event queue registers that changed; the flag says whether it arms.
    pub(super) fn take_eq_doorbells(&self, mut take: impl FnMut([u8; 4], bool)) {
        let registers = [(UAR_EQ_UPDATE_OFFSET, false, 1), (UAR_EQ_ARM_OFFSET, true, 2)];
        for (offset, arms, seen) in registers {
            let value = self.page.span().load32(offset as u64, Ordering::Acquire);
            if self.events_seen[seen].swap(value.into(), Ordering::Relaxed) != u64::from(value) {
                take(value.to_ne_bytes(), arms);
            }
        }
    }
}
