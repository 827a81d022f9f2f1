//! An mlx5 device in software: commands by mailbox, work by memory and doorbells.
//!
//! [`EmulatedHca`] is the device function that a driver opens; [`Fabric`] is what lies between such
//! devices. A device does nothing by itself: somebody calls [`step`](EmulatedHca::step), the host's own
//! threads, a [`DeviceThread`], or a simulation through [`step_seeded`](EmulatedHca::step_seeded).
//!
//! *Who owns what.* Drivers own all memory but the doorbell pages; the device reads and writes what it was
//! granted (`memory.rs`, the only unsafe code). The device owns its objects and the position of each queue.
//!
//! ```text
//!  commands --> objects --publish--> key table, queue pairs, doorbell pages
//!                                        |
//!  doorbell --> requester --Request--> wire --> responder --> memory, receive CQ
//!                   ^------------------Reply------'
//!                   '--> send CQ
//! ```
//!
//! The device learns of work only from commands, from memory it was given and from doorbells, never from
//! Rust values. It is strict: what hardware refuses is refused, with the same status, syndrome and CQE.

mod atomics;
mod capture;
mod commands;
mod counters;
mod cq;
mod doorbell;
mod eq;
mod fabric;
mod frames;
mod futex;
mod hca_impl;
mod memory;
mod message;
mod mishaps;
mod mkeys;
mod qp;
mod requester;
mod responder;
mod seeded;
mod stepping;
pub mod switch;
mod tap;
mod thread;
mod trace;
mod udp;
mod umem;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use ibex_abi::cqe::Syndrome;
use ibex_abi::types::{QpNum, QpState};
use parking_lot::{Mutex, RwLock};

pub use capture::{Capture, Origin};
pub use commands::CommandSyndrome;
pub use counters::{DeviceCounters, FirstError, PacketCounters};
pub(crate) use fabric::advert::open_arbitrary as open_arbitrary_advert;
pub use fabric::advert::{AdvertError, AdvertKind};
pub(crate) use fabric::shm::parse_arbitrary as parse_arbitrary_entries;
pub use fabric::{Fabric, FabricConfig, PORTS_MAX, PathState, Placement, PortId, ShmConfig};
pub use mishaps::ObjectCounts;
pub use stepping::Step;
pub use thread::{Backoff, DeviceThread};
pub use trace::{CommandRecord, ObjectKind, TRACE_MAX};
pub use udp::{BareSocket, Offloads, UdpConfig};

use crate::{AsyncEvent, HcaCaps, HcaError, LinkLayer, Nanos, PortInfo};
use commands::Objects;
use counters::Counters;
use cq::{Cq, Entry, Overrun};
use doorbell::Uar;
use eq::EventTable;
use fabric::Port;
use frames::Station;
use mkeys::MkeyTable;
use qp::Qp;
use requester::complete::Failure;
use trace::Trace;

/// Log2 of the smallest completion queue.
const LOG_MIN_CQ: u8 = 0;
/// Log2 of the largest completion queue.
const LOG_MAX_CQ: u8 = 22;
/// Most asynchronous events that wait to be taken; later ones are dropped and counted.
const EVENTS_MAX: usize = 4096;

/// How a device learns of send work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Doorbells {
    /// A WQE runs only once a doorbell register's value covers it.
    #[default]
    Strict,
    /// A WQE runs as soon as the doorbell record covers it; registers are not looked at.
    Record,
}

/// What an emulated device is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmulatedConfig {
    /// Link layer of its port.
    pub link: LinkLayer,
    /// How it learns of work.
    pub doorbells: Doorbells,
    /// Time that each command takes; its caller sleeps. Commands of one thread do not overlap, as through DevX, whose
    /// calls return when the command has ended; those of several threads, and of several devices, do.
    pub command_latency: Nanos,
    /// Whether the second register pair of each doorbell page is heard too, as by hardware. Our own drivers use the
    /// first only, and who scans many pages looks at half as many words; libmlx5 uses both.
    pub second_register: bool,
}

impl Default for EmulatedConfig {
    fn default() -> Self {
        let (link, doorbells) = (LinkLayer::Roce, Doorbells::Strict);
        Self { link, doorbells, command_latency: Nanos(0), second_register: false }
    }
}

/// Queue pairs by number and in order of creation.
#[derive(Debug, Default)]
struct QpTable {
    list: Vec<Arc<Qp>>,
    by_number: HashMap<u32, Arc<Qp>>,
}

/// One emulated device function with one port.
#[derive(Debug)]
pub struct EmulatedHca {
    config: EmulatedConfig,
    command_latency_ns: AtomicU64,
    caps: HcaCaps,
    port: PortInfo,
    fabric: Arc<Fabric>,
    fabric_port: Arc<Port>,
    /// Sends and receives packets, where the fabric carries them.
    station: Option<Station>,
    objects: Mutex<Objects>,
    keys: RwLock<MkeyTable>,
    qps: Mutex<Arc<QpTable>>,
    uars: Mutex<Arc<[Arc<Uar>]>>,
    /// Held while doorbell registers are compared with records; withdrawing a queue pair takes it too,
    /// so that no record is read after its memory was given back.
    scanning: Mutex<()>,
    events: Mutex<VecDeque<AsyncEvent>>,
    event_table: Mutex<EventTable>,
    /// Somebody took the device out of its slot.
    removed: AtomicBool,
    /// Event queues in the table, so that a device without any does not look for their doorbells.
    num_eqs: AtomicUsize,
    first_errors: Mutex<HashMap<u32, FirstError>>,
    trace: Mutex<Trace>,
    counters: Counters,
}

impl EmulatedHca {
    /// A device attached to the next port of `fabric`.
    ///
    /// # Errors
    /// [`HcaError::Exhausted`] if the fabric has no port left.
    pub fn new(fabric: Arc<Fabric>, config: EmulatedConfig) -> Result<Arc<Self>, HcaError> {
        let mut refused = None;
        let device = Arc::new_cyclic(|this| {
            let make = |id| fabric.port_info(id, config.link);
            let fabric_port = fabric.attach(this, make).unwrap_or_else(|error| {
                refused = Some(error);
                Arc::new(Port::detached(make(PortId(0))))
            });
            let station = fabric.station(&fabric_port).unwrap_or_else(|error| {
                refused.get_or_insert(error);
                None
            });
            Self {
                config,
                command_latency_ns: AtomicU64::new(config.command_latency.0),
                station,
                caps: default_caps(config.link),
                port: *fabric_port.info(),
                fabric: Arc::clone(&fabric),
                fabric_port,
                objects: Mutex::default(),
                keys: RwLock::default(),
                qps: Mutex::default(),
                uars: Mutex::new(Arc::new([])),
                scanning: Mutex::default(),
                events: Mutex::default(),
                event_table: Mutex::default(),
                removed: AtomicBool::new(false),
                num_eqs: AtomicUsize::new(0),
                first_errors: Mutex::default(),
                trace: Mutex::default(),
                counters: Counters::default(),
            }
        });
        match refused {
            None => Ok(device),
            Some(error) => Err(error),
        }
    }

    /// What it was made with.
    #[must_use]
    pub const fn config(&self) -> &EmulatedConfig {
        &self.config
    }

    /// Its port on the fabric.
    #[must_use]
    pub fn port_id(&self) -> PortId {
        self.fabric_port.id()
    }

    /// The fabric it is attached to.
    #[must_use]
    pub const fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }

    fn fabric_port(&self) -> &Arc<Port> {
        &self.fabric_port
    }

    /// What the device did so far.
    #[must_use]
    pub fn counters(&self) -> DeviceCounters {
        self.counters.snapshot()
    }

    /// The first error completion of a queue pair; a collapsed CQ may show a later one.
    #[must_use]
    pub fn first_error(&self, qpn: QpNum) -> Option<FirstError> {
        self.first_errors.lock().get(&qpn.get()).copied()
    }

    /// The commands executed so far, oldest first; the oldest are dropped beyond [`TRACE_MAX`].
    #[must_use]
    pub fn trace(&self) -> Vec<CommandRecord> {
        self.trace.lock().records()
    }

    /// Takes the command trace, which begins anew.
    #[must_use]
    pub fn take_trace(&self) -> Vec<CommandRecord> {
        self.trace.lock().take()
    }

    /// Records that were dropped from a full trace.
    #[must_use]
    pub fn trace_dropped(&self) -> u64 {
        self.trace.lock().dropped()
    }

    /// Fails a queue pair as if its oldest unfinished WQE had met `syndrome`; false if there is no such
    /// queue pair.
    ///
    /// With nothing outstanding the queue pair goes to ERR without a CQE of its own, and everything
    /// posted later is flushed.
    pub fn set_qp_error(&self, qpn: QpNum, syndrome: Syndrome, now: Nanos) -> bool {
        let Some(qp) = self.find_qp(qpn) else {
            return false;
        };
        let mut requester = qp.requester.lock();
        if matches!(qp.state(), QpState::Reset) {
            return true;
        }
        requester.fail(self, &qp, 0, Failure::new(syndrome), now);
        qp.set_state(QpState::Err);
        true
    }

    const fn is_strict(&self) -> bool {
        matches!(self.config.doorbells, Doorbells::Strict)
    }

    /// The queue pairs there are now.
    fn qp_table(&self) -> Arc<QpTable> {
        Arc::clone(&self.qps.lock())
    }

    fn qps(&self) -> Vec<Arc<Qp>> {
        self.qps.lock().list.clone()
    }

    fn find_qp(&self, qpn: QpNum) -> Option<Arc<Qp>> {
        self.qps.lock().by_number.get(&qpn.get()).cloned()
    }

    fn publish_qp(&self, qp: Arc<Qp>) {
        self.change_qps(|table| {
            table.by_number.insert(qp.num().get(), Arc::clone(&qp));
            table.list.push(qp);
        });
    }

    fn withdraw_qp(&self, qpn: QpNum) {
        let _scanning = self.scanning.lock();
        self.change_qps(|table| {
            table.by_number.remove(&qpn.get());
            table.list.retain(|qp| qp.num() != qpn);
        });
        self.first_errors.lock().remove(&qpn.get());
    }

    fn change_qps(&self, change: impl FnOnce(&mut QpTable)) {
        let mut published = self.qps.lock();
        let mut table = QpTable { list: published.list.clone(), by_number: published.by_number.clone() };
        change(&mut table);
        *published = Arc::new(table);
    }

    /// Writes a completion; false if the queue overran, which fails the queue pair.
    fn complete(&self, qp: &Qp, cq: &Cq, entry: impl Entry) -> bool {
        let first = match cq.push(entry) {
            Ok(asked_for) => {
                counters::add(&self.counters.cqes, 1);
                if asked_for {
                    self.post_completion(cq);
                }
                return true;
            }
            Err(Overrun { first }) => first,
        };
        if first {
            self.post_event(AsyncEvent::CqError { cqn: cq.num });
        }
        if qp.state() != QpState::Err {
            qp.set_state(QpState::Err);
            self.post_event(AsyncEvent::QpFatal { qpn: qp.num() });
        }
        false
    }

    fn note_error(&self, qp: &Qp, error: FirstError) {
        self.counters.note_error(error);
        self.first_errors.lock().entry(qp.num().get()).or_insert(error);
    }

    fn queue_event(&self, event: AsyncEvent) {
        let mut events = self.events.lock();
        match events.len() < EVENTS_MAX {
            true => events.push_back(event),
            false => counters::add(&self.counters.dropped_events, 1),
        }
    }

    /// Changes the time that each later command takes.
    pub fn set_command_latency(&self, latency: Nanos) {
        self.command_latency_ns.store(latency.0, Ordering::Relaxed);
    }

    fn await_command_latency(&self) {
        thread::sleep(Nanos(self.command_latency_ns.load(Ordering::Relaxed)));
    }
}

/// Limits of a ConnectX-class device, narrowed to what this one translates.
const fn default_caps(link: LinkLayer) -> HcaCaps {
    HcaCaps {
        link,
        cqe_version: 1,
        log_max_qp_sz: 15,
        log_min_cq_sz: LOG_MIN_CQ,
        log_max_cq_sz: LOG_MAX_CQ,
        max_wqe_sz_sq: 1008,
        // CAST: 512.
        max_wqe_sz_rq: responder::RECV_WQE_MAX as u16,
        // A WQE of 63 segments less control, remote address and inline header.
        max_inline: 1008 - 32 - 4,
        log_max_msg: 30,
        log_max_rd_atomic: 4,
        atomic: true,
        gid_table_size: 1,
    }
}
