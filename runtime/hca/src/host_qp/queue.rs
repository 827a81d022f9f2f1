//! Completion queues as the host reads them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ibex_abi::cqe::{
    COMPLETION_WORD_OFFSET, CQE, CompletionWord, Cqe, CqeOpcode, Syndrome, VendorSyndrome, owner_bit,
};
use ibex_abi::eqe::CqArm;
use ibex_abi::types::{CqNum, Eqn, UarIdx};

use super::{CqShape, create_cq};
use crate::control_region::{Carved, ControlError, ControlRegion};
use crate::{Hca, HcaError, destroyed, objects};

/// How work ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded.
    Good(CqeOpcode),
    /// It failed.
    Error {
        /// Send or receive.
        opcode: CqeOpcode,
        /// What failed.
        syndrome: Syndrome,
        /// Which check.
        vendor: VendorSyndrome,
    },
}

/// A completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// First basic block of the send WQE, or index of the receive WQE, modulo 2^16.
    pub wqe_counter: u16,
    /// Bytes received, read, or sent.
    pub byte_cnt: u32,
    /// Immediate data of a receive.
    pub imm: u32,
    /// The queue pair's user index.
    pub user_index: u32,
    /// How the work ended.
    pub outcome: Outcome,
}

impl Completion {
    /// The syndrome, if the work failed.
    #[must_use]
    pub const fn syndrome(&self) -> Option<Syndrome> {
        match self.outcome {
            Outcome::Good(_) => None,
            Outcome::Error { syndrome, .. } => Some(syndrome),
        }
    }
}

/// A completion queue and the host's position in it.
pub struct HostCq {
    hca: Arc<dyn Hca>,
    num: CqNum,
    is_destroyed: bool,
    shape: CqShape,
    ring: Carved,
    record: Carved,
    consumed: u32,
    /// The last word seen in a collapsed queue.
    last: u32,
}

/// A word that no completion has: what a cleared queue holds.
const NEVER: u32 = u32::MAX;

impl HostCq {
    pub(super) fn create(
        region: &ControlRegion,
        uar: UarIdx,
        shape: CqShape,
        eqn: Option<Eqn>,
    ) -> Result<Self, ControlError> {
        let entries = match shape {
            CqShape::Collapsed => 1,
            CqShape::Ring { log_size, .. } => 1_u64 << log_size,
        };
        let ring = region.carve_ring(entries * CQE as u64)?;
        let record = region.carve_record()?;
        // The bytes may be a predecessor's: a stale consumer index would look like an overrun.
        if let Some(record) = record.view() {
            record.word64(0).store(0, Ordering::Release);
        }
        let num = create_cq(region, uar, shape, eqn, (&ring, &record))?;
        let hca = Arc::clone(region.hca());
        let mut cq = Self { hca, num, is_destroyed: false, shape, ring, record, consumed: 0, last: NEVER };
        cq.clear();
        Ok(cq)
    }

    /// Its number.
    #[must_use]
    pub const fn num(&self) -> CqNum {
        self.num
    }

    /// The memory of its entries.
    #[must_use]
    pub const fn ring(&self) -> &Carved {
        &self.ring
    }

    /// Writes a request for an event into the record; what the register must be told.
    pub(super) fn note_arm(&self, events_taken: u32, solicited_only: bool) -> CqArm {
        // CAST: two bits.
        let sn = (events_taken & 3) as u8;
        let arm = CqArm { cqn: self.num, sn, solicited_only, ci: self.consumed & 0xff_ffff };
        if let Some(record) = self.record.view() {
            record.word32(4).store(arm.record_word().to_be(), Ordering::Release);
        }
        arm
    }

    /// Completions taken from it.
    pub(super) const fn consumed(&self) -> u32 {
        self.consumed
    }

    pub(super) fn destroy(&mut self) -> Result<(), HcaError> {
        if !self.is_destroyed {
            destroyed(objects::destroy_cq(&*self.hca, self.num))?;
            self.is_destroyed = true;
        }
        Ok(())
    }

    /// Marks entries as never written. The device's producer counter is not reset, so a ring's entries
    /// keep the owner bit that the next pass will not have.
    pub(super) fn clear(&mut self) {
        self.last = NEVER;
        if let Some(ring) = self.ring.view() {
            match self.shape {
                CqShape::Collapsed => ring.fill(0xff),
                CqShape::Ring { .. } if self.consumed == 0 => ring.fill(0xff),
                CqShape::Ring { .. } => while self.poll().is_some() {},
            }
        }
    }

    /// The next completion; of a collapsed queue the latest, if it is not the one seen before.
    ///
    /// ORDER(4): the acquire load of the last word pairs with the device's release store of it.
    pub(super) fn poll(&mut self) -> Option<Completion> {
        let ring = self.ring.view()?;
        let (at, owner) = match self.shape {
            CqShape::Collapsed => (0, None),
            CqShape::Ring { log_size, .. } => {
                let slot = self.consumed & ((1 << log_size) - 1);
                (u64::from(slot) * CQE as u64, Some(owner_bit(self.consumed, log_size)))
            }
        };
        let raw = ring.word32(at + COMPLETION_WORD_OFFSET as u64).load(Ordering::Acquire);
        let op_own = CompletionWord::from_register(raw).op_own();
        let foreign = owner.is_some_and(|owner| owner != op_own.owner());
        if op_own.opcode() == Some(CqeOpcode::Invalid) || foreign || (owner.is_none() && raw == self.last) {
            return None;
        }
        let mut bytes = [0; CQE];
        ring.read(at, &mut bytes);
        let completion = decode(&bytes)?;
        self.last = raw;
        self.consumed = self.consumed.wrapping_add(1);
        if owner.is_some() {
            let record = self.record.view()?;
            let consumed = self.consumed & 0xff_ffff;
            record.word32(0).store(consumed.to_be(), Ordering::Release);
        }
        Some(completion)
    }
}

impl Drop for HostCq {
    fn drop(&mut self) {
        if self.destroy().is_err() {
            // The device may still write there.
            self.ring.leak();
            self.record.leak();
        }
    }
}

fn decode(bytes: &[u8; CQE]) -> Option<Completion> {
    match Cqe::parse(bytes).ok()? {
        Cqe::Good(opcode, cqe) => Some(Completion {
            wqe_counter: cqe.word.wqe_counter.get(),
            byte_cnt: cqe.byte_cnt.get(),
            imm: cqe.imm_inval_pkey.get(),
            user_index: cqe.srqn_uidx.get(),
            outcome: Outcome::Good(opcode),
        }),
        Cqe::Error(opcode, cqe) => Some(Completion {
            wqe_counter: cqe.word.wqe_counter.get(),
            byte_cnt: 0,
            imm: 0,
            user_index: cqe.srqn_uidx.get(),
            outcome: Outcome::Error {
                opcode,
                syndrome: Syndrome(cqe.syndrome),
                vendor: VendorSyndrome(cqe.vendor_err_synd),
            },
        }),
        Cqe::Invalid | Cqe::Unknown(_) => None,
    }
}

impl std::fmt::Debug for HostCq {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (num, shape) = (self.num, self.shape);
        f.debug_struct("HostCq").field("num", &num).field("shape", &shape).finish_non_exhaustive()
    }
}
