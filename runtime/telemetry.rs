//! What a session's kernels have counted and which faults they have recorded, readable while they run.
//!
//! Counters and fault records stand in pinned memory; this room owns nothing and only copies them out. Counters of one
//! peer are read one after the other, so two of them may belong to different instants.

use ibex_abi::device_ctx::{DeviceFault, LaneHostWords, LifeWords, PeerTelemetry, RANK_WORDS, code};
use zerocopy::{FromBytes, IntoBytes};

use crate::buffer::LaneBuffers;
use crate::error::Error;
use crate::ids::{Lane, QpSlot, Rank};
use crate::membership::RankSet;
use crate::recovery::DeviceEventCounts;
use crate::session::Session;

/// Counters of one lane, by peer. Units: nanoseconds, requests, bytes.
#[derive(Clone, Debug, Default)]
pub struct LaneTelemetry {
    /// One entry per rank, ourselves included.
    pub peers: Vec<PeerTelemetry>,
    /// Send halves that were refused because another one of this lane ran: nothing of them was posted, no sequence
    /// number drawn. A session keeps its own launches apart; graphs replayed on two streams at once are the caller's
    /// to order.
    pub lane_busy: u64,
}

/// Counters of one session.
#[derive(Clone, Debug, Default)]
pub struct Telemetry {
    /// One entry per lane.
    pub lanes: Vec<LaneTelemetry>,
    /// WQEs of this rank's device of which a doorbell record spoke and no doorbell did; `None` where the device
    /// cannot tell.
    pub unrung_wqes: Option<u64>,
    /// What this rank's device has reported of itself and of its queues.
    pub device_events: DeviceEventCounts,
    /// Regions that serve nobody because a process that was fenced may still write into them.
    pub quarantined_regions: u64,
}

impl Telemetry {
    /// Adds one counter over all lanes and peers.
    pub fn total(&self, counter: impl Fn(&PeerTelemetry) -> u64) -> u64 {
        self.lanes.iter().flat_map(|lane| &lane.peers).map(counter).sum()
    }
}

/// Why a kernel stopped waiting for a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// No sign of life for `detect_ms`.
    Silent,
    /// Alive, past the half that was waited for, and still nothing for `stall_ms`.
    Stalled,
    /// The hard cap of one half.
    Cap,
    /// Error CQE.
    Completion,
    /// A header or count that contradicts the protocol.
    Violation,
    /// Rows could not be reused: no CQE covers the WQEs that name them.
    SourceRows,
    /// A number that this version does not know.
    Unknown(u32),
}

impl FaultKind {
    fn from_code(kind: u32) -> Self {
        match kind {
            code::FAULT_SILENT => Self::Silent,
            code::FAULT_STALLED => Self::Stalled,
            code::FAULT_CAP => Self::Cap,
            code::FAULT_COMPLETION => Self::Completion,
            code::FAULT_VIOLATION => Self::Violation,
            code::FAULT_SOURCE_ROWS => Self::SourceRows,
            other => Self::Unknown(other),
        }
    }
}

/// The first fault of one peer on one lane since it was cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The lane.
    pub lane: Lane,
    /// The peer.
    pub peer: Rank,
    /// Why the kernel stopped waiting.
    pub kind: FaultKind,
    /// The queue pair's slot, where one is involved.
    pub slot: QpSlot,
    /// Whether a combine found it, else a dispatch.
    pub combine: bool,
    /// Sequence number of the step.
    pub seq: u64,
    /// Syndrome of the error CQE; 0 without one.
    pub syndrome: u8,
    /// Vendor syndrome of the error CQE; 0 without one.
    pub vendor_syndrome: u8,
    /// WQE counter of the error CQE.
    pub wqe_counter: u16,
    /// How long the kernel had waited, in nanoseconds.
    pub waited_ns: u64,
    /// For a violation: what was expected and found, 32 bits each.
    pub detail: u64,
}

impl Fault {
    /// `None` while no fault is published.
    fn from_device(lane: Lane, f: &DeviceFault) -> Option<Self> {
        if f.published == 0 {
            return None;
        }
        Some(Self {
            lane,
            // CAST: kernels write a rank, a byte and two bytes into these 32-bit fields.
            peer: Rank(f.peer as u16),
            kind: FaultKind::from_code(f.kind),
            slot: QpSlot(f.qp_slot),
            combine: f.op == code::COMBINE,
            seq: f.seq,
            syndrome: f.syndrome as u8,
            vendor_syndrome: f.vendor_syndrome as u8,
            wqe_counter: f.wqe_counter as u16,
            waited_ns: f.waited_ns,
            detail: f.detail,
        })
    }
}

impl Session {
    pub(crate) fn ranks(&self) -> impl Iterator<Item = Rank> {
        // CAST: at most 512 ranks.
        (0..self.config.num_ranks).map(|rank| Rank(rank as u16))
    }

    /// Copies all counters out.
    ///
    /// # Errors
    /// `Gpu` if the pinned memory cannot be read.
    pub fn telemetry(&self) -> Result<Telemetry, Error> {
        let mut lanes = Vec::new();
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            let busy = buffers.host_words_addr() + core::mem::offset_of!(LaneHostWords, lane_busy) as u64;
            let mut lane = LaneTelemetry { lane_busy: self.gpu.load_u64(busy)?, ..LaneTelemetry::default() };
            for peer in self.ranks() {
                let mut counters = PeerTelemetry::default();
                self.gpu.read(buffers.telemetry_addr(peer), counters.as_mut_bytes())?;
                lane.peers.push(counters);
            }
            lanes.push(lane);
        }
        self.hear_device()?;
        let (unrung_wqes, device_events) = (self.hca.unrung_wqes(), self.device_event_counts());
        let quarantined_regions = self.quarantined_regions();
        Ok(Telemetry { lanes, unrung_wqes, device_events, quarantined_regions })
    }

    /// Faults that kernels have recorded and nobody has cleared yet.
    ///
    /// # Errors
    /// `Gpu` if the pinned memory cannot be read.
    pub fn faults(&self) -> Result<Vec<Fault>, Error> {
        let mut faults = Vec::new();
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            for peer in self.ranks() {
                let addr = buffers.fault_addr(peer);
                let published = core::mem::offset_of!(DeviceFault, published) as u64;
                // ORDER(14): fields -> published. Acquire.
                if self.gpu.load_u32(addr + published)? == 0 {
                    continue;
                }
                let mut bytes = [0; size_of::<DeviceFault>()];
                self.gpu.read(addr, &mut bytes)?;
                let fault =
                    DeviceFault::read_from_bytes(&bytes).expect("the buffer has the structure's size");
                faults.extend(Fault::from_device(runtime.lane(), &fault));
            }
        }
        Ok(faults)
    }

    /// Peers that `peer` no longer waits for on some lane, by its last sign of life.
    ///
    /// # Errors
    /// `Gpu` if the words cannot be read.
    pub fn suspected_by(&self, peer: Rank) -> Result<Vec<Rank>, Error> {
        Ok(self.suspicions_heard_from(peer)?.iter().collect())
    }

    /// Whom `peer` no longer waits for on some lane, by its last sign of life.
    ///
    /// # Errors
    /// `Gpu` if the words cannot be read.
    pub fn suspicions_heard_from(&self, peer: Rank) -> Result<RankSet, Error> {
        let mut words = *RankSet::EMPTY.words();
        for runtime in &self.lanes {
            let life = runtime.buffers.read().region_addr(peer) + self.plan.layout.life_off;
            let row = life + core::mem::offset_of!(LifeWords, suspects) as u64;
            for (at, word) in (row..).step_by(8).zip(&mut words) {
                *word |= self.gpu.load_u64(at)?;
            }
        }
        Ok(RankSet::from_words(words))
    }

    /// One lane's suspicions as bits, which its sign of life carries.
    pub(crate) fn suspicion_row(&self, buffers: &LaneBuffers) -> Result<[u64; RANK_WORDS], Error> {
        let mut row = [0; RANK_WORDS];
        for peer in self.ranks() {
            let suspected = self.gpu.load_u32(buffers.suspect_addr(peer))? != 0;
            row[peer.index() / 64] |= u64::from(suspected) << (peer.index() % 64);
        }
        Ok(row)
    }

    /// Peers that kernels no longer wait for.
    ///
    /// # Errors
    /// `Gpu` if the state cannot be read.
    pub fn suspected(&self) -> Result<Vec<Rank>, Error> {
        let mut suspected = Vec::new();
        for peer in self.ranks() {
            for runtime in &self.lanes {
                if self.gpu.load_u32(runtime.buffers.read().suspect_addr(peer))? != 0 {
                    suspected.push(peer);
                    break;
                }
            }
        }
        Ok(suspected)
    }

    /// Lets kernels wait for `peer` again, and makes room for its next fault.
    ///
    /// Only for a peer whose queue pairs still work; one in error stays lost until it is replaced.
    ///
    /// # Errors
    /// `Gpu` if the state cannot be written.
    pub fn clear_suspicion(&self, peer: Rank) -> Result<(), Error> {
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            self.gpu.fill(buffers.fault_addr(peer), 0, size_of::<DeviceFault>())?;
            self.gpu.store_u32(buffers.suspect_addr(peer), 0)?;
        }
        self.device_log.lock().acquit(peer);
        Ok(())
    }
}
