//! Event queues that a driver makes: where the device tells that something happened.
//!
//! *Who owns what.* The ring is the driver's memory, in a umem that the queue holds; the producer counter and what
//! the device knows of the consumer are the device's. There is no interrupt: an armed queue that gets an entry is
//! fired, and QUERY_EQ shows it. The queues of the completion vectors have no ring of their own here.
//!
//! INVARIANT: the word with the owner byte is stored last, with release: a reader that sees it by an acquire load sees
//! the entry. INVARIANT: a queue that overflowed takes no further entry.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ibex_abi::eqe::{CQ_OVERRUN, CqArm, EQE, EQE_OWNER_WORD_OFFSET, EqDoorbell, Eqe, Event, eqe_owner};
use ibex_abi::types::{Eqn, UarIdx};
use parking_lot::Mutex;
use zerocopy::IntoBytes;

use super::EmulatedHca;
use super::cq::Cq;
use super::memory::Span;
use super::umem::UmemHold;
use crate::AsyncEvent;

/// Consumer and producer indices have this many bits.
const INDEX_MASK: u32 = 0xff_ffff;

/// Where a queue lies, and what it takes.
#[derive(Debug)]
pub(super) struct EqLayout {
    pub(super) ring: Span,
    pub(super) log_size: u8,
    pub(super) uar: UarIdx,
    /// Entries are written whether there is room or not.
    pub(super) overrun_ignore: bool,
    /// Bit t: events of type t come here.
    pub(super) events: u64,
    /// As created; an emulated device raises no interrupt.
    pub(super) interrupt: u8,
    pub(super) log_page_size: u8,
}

/// What changes in the life of a queue.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct EqState {
    pub(super) producer: u32,
    pub(super) consumer: u32,
    pub(super) is_armed: bool,
    pub(super) overflowed: bool,
}

/// An event queue.
#[derive(Debug)]
pub(super) struct Eq {
    pub(super) layout: EqLayout,
    state: Mutex<EqState>,
    /// Released when the queue is destroyed, however long the object itself is referred to.
    pub(super) hold: Mutex<Option<UmemHold>>,
    /// Completion queues that name it.
    pub(super) users: AtomicU32,
}

impl Eq {
    pub(super) fn new(layout: EqLayout, hold: UmemHold) -> Arc<Self> {
        let hold = Mutex::new(Some(hold));
        Arc::new(Self { layout, state: Mutex::default(), hold, users: AtomicU32::new(0) })
    }

    pub(super) fn state(&self) -> EqState {
        *self.state.lock()
    }

    /// Writes the next entry; false if there is no room for it.
    fn push(&self, event: Event) -> bool {
        let hold = self.hold.lock();
        let mut state = self.state.lock();
        let unconsumed = state.producer.wrapping_sub(state.consumer) & INDEX_MASK;
        let is_full = !self.layout.overrun_ignore && unconsumed >= 1 << self.layout.log_size;
        state.overflowed |= is_full;
        if state.overflowed || hold.is_none() {
            return false;
        }
        let mut eqe = Eqe::new(event);
        eqe.owner = eqe_owner(state.producer, self.layout.log_size).into();
        let slot = state.producer & ((1 << self.layout.log_size) - 1);
        store_entry(self.layout.ring, u64::from(slot) * EQE as u64, eqe.as_bytes());
        state.producer = state.producer.wrapping_add(1);
        state.is_armed = false;
        true
    }

    /// The driver has consumed entries up to `ci`, and may want to be told of the next one.
    fn update(&self, ci: u32, arm: bool) {
        let mut state = self.state.lock();
        state.consumer = ci;
        // An entry that came before the request fires at once.
        state.is_armed = arm && state.producer & INDEX_MASK == ci;
    }
}

/// ORDER(18): entry -> its last word, which holds the owner byte. Relaxed words, then one release store.
fn store_entry(ring: Span, at: u64, entry: &[u8]) {
    let (words, _) = entry.as_chunks::<4>();
    for (idx, word) in words.iter().enumerate() {
        let (offset, value) = (4 * idx, u32::from_ne_bytes(*word));
        let order = if offset == EQE_OWNER_WORD_OFFSET { Ordering::Release } else { Ordering::Relaxed };
        ring.store32(at + offset as u64, value, order);
    }
}

/// The event queues that drivers made, and the completion queues that may tell of themselves there.
#[derive(Debug, Default)]
pub(super) struct EventTable {
    pub(super) eqs: HashMap<u32, Arc<Eq>>,
    /// Those with an event queue of a driver.
    pub(super) cqs: HashMap<u32, Arc<Cq>>,
}

impl EmulatedHca {
    /// Tells of something that no completion tells of: to whoever polls, and in the event queues that want it.
    pub(super) fn post_event(&self, event: AsyncEvent) {
        let told = match event {
            AsyncEvent::CqError { cqn } => Event::CqError(cqn, CQ_OVERRUN),
            AsyncEvent::QpFatal { qpn } => Event::QpFatal(qpn),
            AsyncEvent::QpRequestError { qpn } => Event::QpRequestError(qpn),
            AsyncEvent::QpAccessError { qpn } => Event::QpAccessError(qpn),
            AsyncEvent::Completion { cqn } => Event::Completion(cqn),
            // Of a port or the whole device; event queues here carry those of queues only.
            AsyncEvent::PortUp { .. }
            | AsyncEvent::PortDown { .. }
            | AsyncEvent::AddressChanged { .. }
            | AsyncEvent::DeviceRemoved => return self.queue_event(event),
        };
        // Completions go to the queue that their own queue names, and to no other.
        if !matches!(event, AsyncEvent::Completion { .. }) {
            self.tell(told);
        }
        self.queue_event(event);
    }

    /// Entries that the device has written to an event queue, modulo 2^32; `None` if there is no such queue.
    ///
    /// It stands for the queue's interrupt: whoever plays the part of an interrupt controller looks for changes.
    #[must_use]
    pub fn events_written(&self, eqn: Eqn) -> Option<u32> {
        self.event_table.lock().eqs.get(&eqn.get()).map(|eq| eq.state().producer)
    }

    /// Writes an event to the event queues that want its type.
    pub(super) fn tell(&self, event: Event) {
        if !self.has_event_queues() {
            return;
        }
        for eq in self.event_table.lock().eqs.values() {
            if eq.layout.events & event.event_type().bit() != 0 {
                self.count_pushed(eq.push(event));
            }
        }
    }

    /// Tells the event queue of `cq`, if a driver made it, of a completion; false if none did.
    pub(super) fn post_completion(&self, cq: &Cq) -> bool {
        let Some(eq) = &cq.eq else { return false };
        self.count_pushed(eq.push(Event::Completion(cq.num)));
        true
    }

    fn count_pushed(&self, pushed: bool) {
        let counters = &self.counters;
        super::counters::add(if pushed { &counters.eqes } else { &counters.dropped_events }, 1);
    }

    pub(super) fn has_event_queues(&self) -> bool {
        self.num_eqs.load(Ordering::Relaxed) != 0
    }

    /// Takes in requests to arm completion queues, and event queues' consumer indices.
    ///
    /// A register remembers its last value only; the requests of completion queues stand in their records as well, so
    /// any change of a register is a reason to look at all of them.
    pub(super) fn take_event_doorbells(&self) -> bool {
        if !self.has_event_queues() {
            return false;
        }
        // Another thread that looks does it for us.
        let Some(table) = self.event_table.try_lock() else { return false };
        let uars = Arc::clone(&self.uars.lock());
        let mut did_work = false;
        for uar in uars.iter() {
            if let Some(request) = uar.take_arm() {
                did_work = true;
                self.arm(&table, CqArm::from_bytes(request));
                for request in table.cqs.values().filter_map(|cq| cq.take_arm_record()) {
                    self.arm(&table, request);
                }
            }
            uar.take_eq_doorbells(|bytes, arm| {
                let EqDoorbell { eqn, ci } = EqDoorbell::from_bytes(bytes);
                did_work = true;
                if let Some(eq) = table.eqs.get(&eqn.get()).filter(|eq| eq.layout.uar == uar.idx) {
                    eq.update(ci, arm);
                }
            });
        }
        did_work
    }

    fn arm(&self, table: &EventTable, request: CqArm) {
        if let Some(cq) = table.cqs.get(&request.cqn.get())
            && cq.arm(request)
        {
            self.post_completion(cq);
        }
    }
}
