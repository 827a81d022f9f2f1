//! Completion queues.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ibex_abi::prm::{self, Status};
use ibex_abi::types::CqNum;

use super::{
    CommandSyndrome, Done, OBJECTS_MAX, Objects, Refusal, Touched, get8, get32, next_number, refuse,
};
use crate::emulated::cq::{Cq, CqLayout};
use crate::emulated::eq::EventTable;
use crate::emulated::memory::Span;
use crate::emulated::trace::ObjectKind;
use crate::emulated::umem::UmemHold;
use crate::emulated::{LOG_MAX_CQ, LOG_MIN_CQ};

/// Doorbell records are 8 bytes.
pub(super) const RECORD_LEN: u64 = 8;

impl Objects {
    /// A piece of a umem for a queue, held for it.
    pub(super) fn carve(
        &self,
        umem: u32,
        offset: u64,
        len: u64,
        align: u64,
    ) -> Result<(Span, UmemHold), Refusal> {
        let outside = refuse(Status::BadParam, CommandSyndrome::OutsideUmem);
        let (span, hold) = self.umem(umem)?.hold(offset, len).ok_or(outside)?;
        match span.is_aligned(0, align) {
            true => Ok((span, hold)),
            false => Err(outside),
        }
    }

    /// Holds the umem that a piece of memory lies in.
    pub(super) fn hold_span(&self, piece: Span) -> Option<UmemHold> {
        self.umems.values().find_map(|umem| umem.hold_span(piece))
    }

    pub(super) fn create_cq(&mut self, events: &mut EventTable, input: &[u8], output: &mut [u8]) -> Done {
        use prm::{cqc, create_cq_in as cmd};
        let context = prm::part(input, cmd::CQ_CONTEXT);
        if self.cqs.len() >= OBJECTS_MAX {
            return Err(refuse(Status::NoRes, CommandSyndrome::TableFull));
        }
        if prm::get(input, cmd::CQ_UMEM_VALID) == 0 || prm::get(context, cqc::DBR_UMEM_VALID) == 0 {
            return Err(refuse(Status::BadParam, CommandSyndrome::NotInUmem));
        }
        let log_size = get8(context, cqc::LOG_CQ_SIZE);
        if !(LOG_MIN_CQ..=LOG_MAX_CQ).contains(&log_size) {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadQueueSize));
        }
        let stride = match prm::get(context, cqc::CQE_SZ) {
            0 => 64,
            1 => 128,
            _ => return Err(refuse(Status::BadParam, CommandSyndrome::BadEntrySize)),
        };
        let number = get32(context, cqc::C_EQN);
        let eq = events.eqs.get(&number).cloned();
        if eq.is_none() && !self.eqs.contains(&number) {
            return Err(refuse(Status::BadRes, CommandSyndrome::UnknownEq));
        }
        self.uar(get32(context, cqc::UAR_PAGE))?;
        let collapsed = prm::get(context, cqc::CC) == 1;
        let len = if collapsed { stride } else { stride << log_size };
        let ring_umem = get32(input, cmd::CQ_UMEM_ID);
        let (ring, ring_hold) = self.carve(ring_umem, prm::get(input, cmd::CQ_UMEM_OFFSET), len, 64)?;
        let record_umem = get32(context, cqc::DBR_UMEM_ID);
        let record_at = prm::get(context, cqc::DBR_ADDR);
        let (record, record_hold) = self.carve(record_umem, record_at, RECORD_LEN, RECORD_LEN)?;
        let overrun_ignore = prm::get(context, cqc::OI) == 1;
        let num = next_number(&mut self.next_cq, 1, |cq| self.cqs.contains_key(&cq));
        let layout = CqLayout { ring, record, log_size, stride, collapsed, overrun_ignore };
        let cq = Cq::new(CqNum::new(num), layout, vec![ring_hold, record_hold], eq);
        if let Some(eq) = &cq.eq {
            eq.users.fetch_add(1, Ordering::AcqRel);
            events.cqs.insert(num, Arc::clone(&cq));
        }
        self.cqs.insert(num, cq);
        prm::set(output, prm::create_cq_out::CQN, num.into());
        Ok(Touched::new(ObjectKind::Cq, num))
    }

    pub(super) fn destroy_cq(&mut self, events: &mut EventTable, input: &[u8]) -> Done {
        let num = get32(input, prm::destroy_cq_in::CQN);
        let unknown = refuse(Status::BadRes, CommandSyndrome::UnknownCq);
        let cq = self.cqs.get(&num).ok_or(unknown)?;
        if cq.users.load(Ordering::Acquire) != 0 {
            return Err(refuse(Status::ResBusy, CommandSyndrome::InUse));
        }
        // No queue pair completes into it and nobody looks for its requests, so nobody touches its memory from here
        // on.
        events.cqs.remove(&num);
        if let Some(eq) = &cq.eq {
            eq.users.fetch_sub(1, Ordering::AcqRel);
        }
        cq.holds.lock().clear();
        self.cqs.remove(&num);
        Ok(Touched::new(ObjectKind::Cq, num))
    }
}
