//! A queue pair that the host drives: control traffic, signs of life, tests.
//!
//! *Who owns what.* A [`HostQp`] owns its queue pair, completion queues and doorbell page on the device,
//! and the pieces of the control region they live in. Dropping it destroys the objects first; memory of
//! an object that the device would not destroy is leaked, never reused.
//!
//! Its type names its state, so that only a queue pair in RTS can post:
//!
//! ```text
//!  HostQp<Reset> --to_init--> HostQp<Init> --to_rtr--> HostQp<Rtr> --to_rts--> HostQp<Rts>
//!        ^                                                                        |
//!        '---------------------------------- reset -------------------------------'
//! ```
//!
//! Posting is three separate steps, because each must be ordered after the one before: entries
//! ([`Batch::push`]), doorbell record ([`Batch::commit`]), doorbell ([`Unrung::ring`]).

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ibex_abi::doorbell::Doorbell;
use ibex_abi::types::{CqNum, Eqn, PathMtu, Pd, Psn, QpNum};

use crate::control_region::{Carved, ControlError, ControlRegion};
use crate::objects::{self, CqSpec, InitSpec, QpInfo, QpSpec, RecvSpec, RtrSpec, RtsSpec};
use crate::register::Registers;
use crate::{Access, DoorbellPage, Hca, HcaError, Path, PortAddress, destroyed};

mod post;
mod queue;

pub use post::{Batch, PostError, Unrung};
pub use queue::{Completion, HostCq, Outcome};

/// The queue pair is in RST.
#[derive(Debug)]
pub enum Reset {}
/// The queue pair is in INIT: receives may be posted.
#[derive(Debug)]
pub enum Init {}
/// The queue pair is in RTR: it answers.
#[derive(Debug)]
pub enum Rtr {}
/// The queue pair is in RTS: it sends.
#[derive(Debug)]
pub enum Rts {}

/// The shape of a completion queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CqShape {
    /// One entry that every completion overwrites; never overruns.
    Collapsed,
    /// A ring of `1 << log_size` entries.
    Ring {
        /// Log2 of the number of entries.
        log_size: u8,
        /// Overwrite entries that were not consumed.
        overrun_ignore: bool,
    },
}

/// What a host queue pair is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostQpSpec {
    /// Log2 of the number of WQEBBs in the send queue.
    pub log_sq_size: u8,
    /// Receive queue, if it has one.
    pub recv: Option<RecvSpec>,
    /// Where sends complete.
    pub send_cq: CqShape,
    /// Where receives complete; used only with a receive queue.
    pub recv_cq: CqShape,
    /// Number that completions carry back.
    pub user_index: u32,
    /// Event queue of its completion queues; by default that of completion vector 0.
    pub eqn: Option<Eqn>,
}

impl Default for HostQpSpec {
    fn default() -> Self {
        let cq = CqShape::Collapsed;
        Self { log_sq_size: 6, recv: None, send_cq: cq, recv_cq: cq, user_index: 0, eqn: None }
    }
}

/// One end of a connection, as the ends tell each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// The port.
    pub address: PortAddress,
    /// The queue pair.
    pub qpn: QpNum,
    /// First sequence number that it sends.
    pub psn: Psn,
}

/// How a connection behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectSpec {
    /// First sequence number that this end sends.
    pub psn: Psn,
    /// What the remote end may do.
    pub access: Access,
    /// Largest packet; the path's if smaller.
    pub mtu: PathMtu,
    /// See [`RtsSpec::ack_timeout`].
    pub ack_timeout: u8,
    /// See [`RtsSpec::retry_count`].
    pub retry_count: u8,
    /// See [`RtsSpec::rnr_retry`].
    pub rnr_retry: u8,
    /// See [`RtrSpec::min_rnr_nak`].
    pub min_rnr_nak: u8,
    /// Log2 of the READs and atomics in flight, both ways.
    pub log_reads: u8,
}

impl Default for ConnectSpec {
    fn default() -> Self {
        Self {
            psn: Psn::new(0),
            access: Access::ALL,
            mtu: PathMtu::B4096,
            ack_timeout: 14,
            retry_count: 7,
            rnr_retry: 7,
            min_rnr_nak: 12,
            log_reads: 4,
        }
    }
}

/// Objects and memory of a host queue pair, whatever its state.
struct Core {
    hca: Arc<dyn Hca>,
    spec: HostQpSpec,
    pd: Pd,
    qpn: QpNum,
    page: DoorbellPage,
    has_page: bool,
    registers: Registers,
    /// Receive ring, then send ring.
    rings: Carved,
    record: Carved,
    send_cq: HostCq,
    recv_cq: Option<HostCq>,
    send: post::SendState,
    recv_posted: u16,
}

/// A queue pair in state `S`.
pub struct HostQp<S> {
    core: Option<Box<Core>>,
    state: PhantomData<S>,
}

impl<S> HostQp<S> {
    fn core(&self) -> &Core {
        // PANIC: `core` is taken only by methods that consume the queue pair.
        self.core.as_ref().expect("a queue pair has a core")
    }

    fn core_mut(&mut self) -> &mut Core {
        // PANIC: as in `core`.
        self.core.as_mut().expect("a queue pair has a core")
    }

    fn become_state<T>(mut self) -> HostQp<T> {
        HostQp { core: self.core.take(), state: PhantomData }
    }

    /// Its number.
    #[must_use]
    pub fn qpn(&self) -> QpNum {
        self.core().qpn
    }

    /// What it was made with.
    #[must_use]
    pub fn spec(&self) -> &HostQpSpec {
        &self.core().spec
    }

    /// What its remote end must know, if it starts at `psn`.
    #[must_use]
    pub fn endpoint(&self, psn: Psn) -> Endpoint {
        let core = self.core();
        Endpoint { address: core.hca.port().address(), qpn: core.qpn, psn }
    }

    /// What the device says about it.
    ///
    /// # Errors
    /// The device's refusal.
    pub fn query(&self) -> Result<QpInfo, HcaError> {
        objects::query_qp(&*self.core().hca, self.core().qpn)
    }

    /// Moves it to ERR on the device: everything posted is flushed.
    ///
    /// # Errors
    /// The device's refusal.
    pub fn fail(&self) -> Result<(), HcaError> {
        objects::to_err(&*self.core().hca, self.core().qpn)
    }

    /// Destroys the queue pair, its completion queues and its page now, so that a refusal is seen; a retry
    /// goes on where this stopped. Dropping does the same, and leaks what is refused.
    ///
    /// # Errors
    /// The device's refusal.
    pub fn destroy(&mut self) -> Result<(), HcaError> {
        self.core_mut().destroy()
    }

    /// The next send completion.
    pub fn poll(&mut self) -> Option<Completion> {
        let core = self.core_mut();
        let completion = core.send_cq.poll()?;
        core.send.completed(&completion);
        Some(completion)
    }

    /// Asks for one event for the next send completion that this host has not taken yet. `events_taken` counts the
    /// events taken for this queue so far. Of a collapsed queue, whose overwritten completions nobody takes, the event
    /// may come early.
    pub fn arm(&self, events_taken: u32, solicited_only: bool) {
        let core = self.core();
        core.registers.arm_cq(core.send_cq.note_arm(events_taken, solicited_only));
    }

    /// The next receive completion.
    pub fn poll_recv(&mut self) -> Option<Completion> {
        self.core_mut().recv_cq.as_mut()?.poll()
    }

    /// The piece of memory that holds the receive ring and, after it, the send ring.
    #[must_use]
    pub fn rings(&self) -> &Carved {
        &self.core().rings
    }

    /// The piece of memory that holds the doorbell record.
    #[must_use]
    pub fn record(&self) -> &Carved {
        &self.core().record
    }

    /// The piece of memory that holds the send completions.
    #[must_use]
    pub fn send_cq(&self) -> &HostCq {
        &self.core().send_cq
    }

    /// Stores an arbitrary doorbell, as a faulty kernel might.
    pub fn store_doorbell(&self, doorbell: Doorbell) {
        self.core().registers.ring(doorbell);
    }

    /// Takes it to ERR and RST, then clears its memory: rings may be used by a successor.
    ///
    /// # Errors
    /// The device's refusal; the objects are then destroyed.
    pub fn reset(mut self) -> Result<HostQp<Reset>, HcaError> {
        let core = self.core_mut();
        objects::to_err(&*core.hca, core.qpn)?;
        objects::to_reset(&*core.hca, core.qpn)?;
        core.clear();
        Ok(self.become_state())
    }
}

impl HostQp<Reset> {
    /// Creates a queue pair and all it needs in `region`.
    ///
    /// # Errors
    /// The region is full, or the device's refusal; nothing is left behind.
    pub fn create(region: &ControlRegion, pd: Pd, spec: HostQpSpec) -> Result<Self, ControlError> {
        let core = Core::create(region, pd, spec)?;
        Ok(Self { core: Some(Box::new(core)), state: PhantomData })
    }

    /// Replaces the queue pair by a new one, with another number, over the same memory.
    ///
    /// # Errors
    /// The device's refusal; the objects are then destroyed.
    pub fn renew(mut self) -> Result<Self, HcaError> {
        let core = self.core_mut();
        objects::destroy_qp(&*core.hca, core.qpn)?;
        core.clear();
        core.qpn = objects::create_qp(&*core.hca, &core.qp_spec())?;
        core.send.qpn = core.qpn;
        Ok(self)
    }

    /// To INIT.
    ///
    /// # Errors
    /// The device's refusal; the objects are then destroyed.
    pub fn to_init(self, access: Access) -> Result<HostQp<Init>, HcaError> {
        let core = self.core();
        let (port_num, pkey_index) = (core.hca.port().port_num, core.hca.pkey_index());
        objects::rst2init(&*core.hca, &InitSpec { qpn: core.qpn, pkey_index, port_num, access })?;
        Ok(self.become_state())
    }

    /// All the way to RTS, connected to `remote`.
    ///
    /// # Errors
    /// The device's refusal; the objects are then destroyed.
    pub fn connect(self, remote: &Endpoint, spec: &ConnectSpec) -> Result<HostQp<Rts>, HcaError> {
        self.to_init(spec.access)?.to_rtr(remote, spec)?.to_rts(spec)
    }
}

impl HostQp<Init> {
    /// To RTR.
    ///
    /// # Errors
    /// The remote port is unreachable, or the device's refusal; the objects are then destroyed.
    pub fn to_rtr(self, remote: &Endpoint, spec: &ConnectSpec) -> Result<HostQp<Rtr>, HcaError> {
        let core = self.core();
        let path: Path = core.hca.resolve(&remote.address)?.of_queue_pair(core.qpn, remote.qpn);
        let rtr = RtrSpec {
            qpn: core.qpn,
            remote_qpn: remote.qpn,
            rq_psn: remote.psn,
            mtu: spec.mtu.min(path.mtu),
            path,
            min_rnr_nak: spec.min_rnr_nak,
            log_rra_max: spec.log_reads,
        };
        objects::init2rtr(&*core.hca, &rtr)?;
        Ok(self.become_state())
    }
}

impl HostQp<Rtr> {
    /// To RTS.
    ///
    /// # Errors
    /// The device's refusal; the objects are then destroyed.
    pub fn to_rts(self, spec: &ConnectSpec) -> Result<HostQp<Rts>, HcaError> {
        let core = self.core();
        let rts = RtsSpec {
            qpn: core.qpn,
            sq_psn: spec.psn,
            ack_timeout: spec.ack_timeout,
            retry_count: spec.retry_count,
            rnr_retry: spec.rnr_retry,
            log_sra_max: spec.log_reads,
        };
        objects::rtr2rts(&*core.hca, &rts)?;
        Ok(self.become_state())
    }
}

impl Core {
    fn create(region: &ControlRegion, pd: Pd, spec: HostQpSpec) -> Result<Self, ControlError> {
        let hca = Arc::clone(region.hca());
        let recv_len = spec.recv.map_or(0, |recv| recv.len());
        let sq_len = 64_u64 << spec.log_sq_size;
        let page = hca.alloc_doorbell()?;
        let made = (|| {
            let rings = region.carve_ring(recv_len + sq_len)?;
            let record = region.carve_record()?;
            let cq = |shape| HostCq::create(region, page.uar, shape, spec.eqn);
            let send_cq = cq(spec.send_cq)?;
            let recv_cq = spec.recv.map(|_| cq(spec.recv_cq));
            Ok::<_, ControlError>((rings, record, send_cq, recv_cq.transpose()?))
        })();
        let (rings, record, send_cq, recv_cq) = match made {
            Ok(made) => made,
            Err(error) => {
                // Nothing refers to the page; if even that fails the page is lost, harmlessly.
                let _ = hca.free_doorbell(page);
                return Err(error);
            }
        };
        let send = post::SendState::new(spec.log_sq_size, recv_len);
        let mut core = Self {
            hca,
            spec,
            pd,
            // Nothing has this number until the queue pair is created.
            qpn: QpNum::new(0),
            page,
            has_page: true,
            registers: Registers::of(&page),
            rings,
            record,
            send_cq,
            recv_cq,
            send,
            recv_posted: 0,
        };
        core.clear();
        core.qpn = objects::create_qp(&*core.hca, &core.qp_spec())?;
        core.send.qpn = core.qpn;
        Ok(core)
    }

    fn qp_spec(&self) -> QpSpec {
        let send_cq = self.send_cq.num();
        QpSpec {
            pd: self.pd,
            log_sq_size: self.spec.log_sq_size,
            recv: self.spec.recv,
            rings: self.rings.place(),
            record: self.record.place(),
            uar: self.page.uar,
            send_cq,
            recv_cq: self.recv_cq.as_ref().map_or(send_cq, HostCq::num),
            user_index: self.spec.user_index,
        }
    }

    /// Clears record and completions and starts all indices at 0; the device must be in RST.
    fn clear(&mut self) {
        if let Some(record) = self.record.view() {
            record.word64(0).store(0, Ordering::Release);
        }
        self.send.clear();
        self.recv_posted = 0;
        self.send_cq.clear();
        if let Some(cq) = &mut self.recv_cq {
            cq.clear();
        }
    }
}

impl Core {
    /// The queue pair first: the device keeps what it refers to.
    fn destroy(&mut self) -> Result<(), HcaError> {
        self.destroy_queues()?;
        self.free_page()
    }

    fn destroy_queues(&mut self) -> Result<(), HcaError> {
        if self.qpn.get() != 0 {
            destroyed(objects::destroy_qp(&*self.hca, self.qpn))?;
            self.qpn = QpNum::new(0);
        }
        self.send_cq.destroy()?;
        if let Some(cq) = &mut self.recv_cq {
            cq.destroy()?;
        }
        Ok(())
    }

    fn free_page(&mut self) -> Result<(), HcaError> {
        if self.has_page {
            destroyed(self.hca.free_doorbell(self.page))?;
            self.has_page = false;
        }
        Ok(())
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.destroy_queues().is_err() {
            // The device may still write there, also for a queue pair whose number was lost with the reply that named
            // it: each piece keeps its bytes, and the region its memory. The completion queues find out by themselves
            // that they are in use.
            self.rings.leak();
            self.record.leak();
        } else {
            // A page that is not given back is lost to the device, and harmless.
            let _ = self.free_page();
        }
    }
}

impl<S> std::fmt::Debug for HostQp<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (qpn, state) = (self.qpn(), std::any::type_name::<S>());
        f.debug_struct("HostQp").field("qpn", &qpn).field("state", &state).finish_non_exhaustive()
    }
}

/// The completion queue's number for a spec; here so that [`queue`] needs no device types.
fn create_cq(
    region: &ControlRegion,
    uar: ibex_abi::types::UarIdx,
    shape: CqShape,
    eqn: Option<Eqn>,
    (ring, record): (&Carved, &Carved),
) -> Result<CqNum, HcaError> {
    let (log_size, collapsed, overrun_ignore) = match shape {
        CqShape::Collapsed => (region.hca().caps().log_min_cq_sz, true, true),
        CqShape::Ring { log_size, overrun_ignore } => (log_size, false, overrun_ignore),
    };
    let eqn = eqn.map_or_else(|| region.hca().eqn(0), Ok)?;
    let (ring, record) = (ring.place(), record.place());
    let spec = CqSpec { eqn, log_size, ring, record, uar, collapsed, overrun_ignore };
    objects::create_cq(&**region.hca(), &spec)
}
