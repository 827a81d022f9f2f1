//! Event queues.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ibex_abi::eqe::EQE;
use ibex_abi::prm::{self, Status};

use super::memory::first_page;
use super::{CommandSyndrome, Done, FIRST_EQN, NUM_VECTORS, Objects, Refusal, Touched, get8, get32, refuse};
use crate::emulated::EmulatedHca;
use crate::emulated::eq::{Eq, EqLayout};
use crate::emulated::memory::Span;
use crate::emulated::trace::ObjectKind;
use crate::emulated::umem::UmemHold;

/// Log2 of the number of entries.
const LOG_EQ: std::ops::RangeInclusive<u8> = 1..=22;
/// Numbers of queues that drivers make; those below are the completion vectors'.
const DRIVERS_EQNS: std::ops::RangeInclusive<u32> = FIRST_EQN + NUM_VECTORS..=0xff;
/// Log2 of the unit of `log_page_size`.
const LOG_ADAPTER_PAGE: u32 = 12;
/// `eqc.status` of a queue that overflowed.
const EQ_WRITE_FAILURE: u64 = 0xa;
/// `eqc.st`.
const ARMED: u64 = 0x9;
const FIRED: u64 = 0xa;

impl Objects {
    /// The queue's memory, which must lie in a umem: that keeps it from being withdrawn.
    fn event_ring(&self, pages: &[u8], log_size: u8, log_page: u32) -> Result<(Span, UmemHold), Refusal> {
        let bad_pages = refuse(Status::BadParam, CommandSyndrome::BadPages);
        let page = 1_u64.checked_shl(log_page).ok_or(bad_pages)?;
        let len = (EQE as u64) << log_size;
        let first = first_page(pages, len.div_ceil(page), page)?;
        let ring = self.iommu.span(first, len).ok_or(bad_pages)?;
        self.hold_span(ring).map(|hold| (ring, hold)).ok_or(bad_pages)
    }
}

impl EmulatedHca {
    pub(super) fn create_eq(&self, objects: &mut Objects, input: &[u8], output: &mut [u8]) -> Done {
        use prm::{create_eq_in as cmd, eqc};
        let context = prm::part(input, cmd::EQ_CONTEXT_ENTRY);
        let log_size = get8(context, eqc::LOG_EQ_SIZE);
        if !LOG_EQ.contains(&log_size) {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadQueueSize));
        }
        let uar = objects.uar(get32(context, eqc::UAR_PAGE))?.idx;
        let log_page_size = get8(context, eqc::LOG_PAGE_SIZE);
        let log_page = u32::from(log_page_size) + LOG_ADAPTER_PAGE;
        let (ring, hold) = objects.event_ring(&input[cmd::LEN..], log_size, log_page)?;
        let layout = EqLayout {
            ring,
            log_size,
            uar,
            overrun_ignore: prm::get(context, eqc::OI) == 1,
            events: prm::get(input, cmd::EVENT_BITMASK),
            interrupt: get8(context, eqc::INTR),
            log_page_size,
        };
        let mut table = self.event_table.lock();
        let free = DRIVERS_EQNS.into_iter().find(|number| !table.eqs.contains_key(number));
        let number = free.ok_or(refuse(Status::NoRes, CommandSyndrome::TableFull))?;
        table.eqs.insert(number, Eq::new(layout, hold));
        self.num_eqs.store(table.eqs.len(), Ordering::Relaxed);
        prm::set(output, prm::create_eq_out::EQ_NUMBER, number.into());
        Ok(Touched::new(ObjectKind::Eq, number))
    }

    pub(super) fn destroy_eq(&self, input: &[u8]) -> Done {
        let number = get32(input, prm::destroy_eq_in::EQ_NUMBER);
        let mut table = self.event_table.lock();
        let eq = table.eqs.get(&number).ok_or(refuse(Status::BadRes, CommandSyndrome::UnknownEq))?;
        if eq.users.load(Ordering::Acquire) != 0 {
            return Err(refuse(Status::ResBusy, CommandSyndrome::InUse));
        }
        // Whoever is writing an entry holds this lock.
        eq.hold.lock().take();
        table.eqs.remove(&number);
        self.num_eqs.store(table.eqs.len(), Ordering::Relaxed);
        Ok(Touched::new(ObjectKind::Eq, number))
    }

    pub(super) fn query_eq(&self, input: &[u8], output: &mut [u8]) -> Done {
        use prm::{eqc, query_eq_out as out};
        let number = get32(input, prm::query_eq_in::EQ_NUMBER);
        let eq = self.event_table.lock().eqs.get(&number).map(Arc::clone);
        let eq = eq.ok_or(refuse(Status::BadRes, CommandSyndrome::UnknownEq))?;
        // What a driver rang before it asked counts.
        self.take_event_doorbells();
        let (layout, state) = (&eq.layout, eq.state());
        prm::set(output, out::EVENT_BITMASK, layout.events);
        let context = prm::part_mut(output, out::EQ_CONTEXT_ENTRY);
        for (field, value) in [
            (eqc::STATUS, if state.overflowed { EQ_WRITE_FAILURE } else { 0 }),
            (eqc::OI, layout.overrun_ignore.into()),
            (eqc::ST, if state.is_armed { ARMED } else { FIRED }),
            (eqc::LOG_EQ_SIZE, layout.log_size.into()),
            (eqc::UAR_PAGE, layout.uar.into()),
            (eqc::INTR, layout.interrupt.into()),
            (eqc::LOG_PAGE_SIZE, layout.log_page_size.into()),
            (eqc::CONSUMER_COUNTER, (state.consumer & 0xff_ffff).into()),
            (eqc::PRODUCER_COUNTER, (state.producer & 0xff_ffff).into()),
        ] {
            prm::set(context, field, value);
        }
        Ok(Touched::new(ObjectKind::Eq, number))
    }
}
