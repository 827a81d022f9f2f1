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
}

impl Uar {
    pub(super) fn new(idx: UarIdx) -> Self {
        Self { idx, page: OwnPage::new(), seen: [AtomicU64::new(0), AtomicU64::new(0)] }
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
}
