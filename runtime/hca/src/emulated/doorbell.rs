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
use ibex_abi::types::{QpNum, UarIdx};

use super::memory::OwnPage;

/// The two halves of the first BlueFlame register, which libmlx5 uses in turn, and those of the second.
const REGISTERS: [u64; 4] = {
    let first = UAR_BLUE_FLAME_OFFSET as u64;
    [first, first + 0x100, first + 0x200, first + 0x300]
};

/// One user access region.
#[derive(Debug)]
pub(super) struct Uar {
    pub(super) idx: UarIdx,
    page: OwnPage,
    /// Registers that are heard: those of the first pair, or of both.
    heard: usize,
    seen: [AtomicU64; REGISTERS.len()],
    /// As `seen`: the registers that arm a completion queue, arm an event queue, and update one.
    events_seen: [AtomicU64; 3],
}

impl Uar {
    pub(super) fn new(idx: UarIdx, hears_second: bool) -> Self {
        let heard = if hears_second { REGISTERS.len() } else { REGISTERS.len() / 2 };
        Self { idx, page: OwnPage::new(), heard, seen: Default::default(), events_seen: Default::default() }
    }

    /// Registers that are heard, and what each held last.
    fn registers(&self) -> impl Iterator<Item = (u64, &AtomicU64)> {
        REGISTERS.into_iter().zip(&self.seen).take(self.heard)
    }

    /// Address of the register that drivers store to.
    pub(super) fn register(&self) -> u64 {
        self.page.span().addr() + REGISTERS[0]
    }

    /// Whether a register changed since the last poll.
    pub(super) fn has_news(&self) -> bool {
        let page = self.page.span();
        self.registers().any(|(at, seen)| page.load64(at, Ordering::Acquire) != seen.load(Ordering::Relaxed))
    }

    /// Calls `ring` for each register that changed since the last poll.
    pub(super) fn poll(&self, mut ring: impl FnMut(Doorbell)) {
        for (offset, seen) in self.registers() {
            let value = self.page.span().load64(offset, Ordering::Acquire);
            if seen.load(Ordering::Relaxed) != value {
                seen.store(value, Ordering::Relaxed);
                ring(Doorbell::from_register(value));
            }
        }
    }

    /// Forgets what a queue pair rang. Hardware hears every store, a word of memory shows changes only: after a reset
    /// the first doorbell may well be the one that was rung last.
    pub(super) fn forget(&self, qpn: QpNum) {
        for (offset, seen) in self.registers() {
            let value = self.page.span().load64(offset, Ordering::Acquire);
            if value != 0 && Doorbell::from_register(value).qpn() == qpn {
                seen.store(0, Ordering::Relaxed);
                self.page.span().store64(offset, 0, Ordering::Release);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_of_a_register_that_is_heard_is_told_once() {
        for (hears_second, told) in [(false, 2), (true, 4)] {
            let uar = Uar::new(UarIdx::new(1), hears_second);
            for (idx, at) in REGISTERS.into_iter().enumerate() {
                uar.page.span().store64(at, idx as u64 + 1, Ordering::Release);
            }
            assert!(uar.has_news());
            let mut rings = 0;
            uar.poll(|_| rings += 1);
            assert_eq!(rings, told);
            assert!(!uar.has_news());
            uar.poll(|_| panic!("nothing changed"));
        }
    }

    #[test]
    fn the_same_doorbell_is_news_after_a_reset_and_a_neighbours_stays() {
        let uar = Uar::new(UarIdx::new(1), true);
        let [ours, theirs] = [7, 8].map(|qpn| Doorbell::from_bytes([0, 0, 1, 8, 0, 0, qpn, 2]));
        let ring = |at: usize, doorbell: Doorbell| {
            uar.page.span().store64(REGISTERS[at], doorbell.to_register(), Ordering::Release);
        };
        let heard = || {
            let mut heard = Vec::new();
            uar.poll(|doorbell| heard.push(doorbell.qpn().get()));
            heard
        };
        ring(0, ours);
        ring(1, theirs);
        assert_eq!(heard(), [7, 8]);
        uar.forget(QpNum::new(7));
        assert!(heard().is_empty());
        ring(0, ours);
        ring(1, theirs);
        assert_eq!(heard(), [7]);
    }
}
