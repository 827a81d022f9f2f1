//! One rank's part of `bench ep`, the same in one process with all others and in one of its own.
//!
//! A [`RankBench`] owns a rank's events and captured graphs; tensors and session are the [`RigRank`]'s.

use core::ops::AddAssign;

use ibex::error::Error;
use ibex::gpu::Event;
use ibex::harness::RigRank;
use ibex::ids::Lane;
use ibex::reference::check::{Step, Verdict};
use ibex::reference::inputs::RankInput;
use ibex::session::{CombineSource, DispatchCall, DispatchHandle, Halves, SessionGraph, TopkDtype};
use ibex_hca::emulated::EmulatedHca;
use ibex_hca::emulated::switch::FaultCounts;
use serde::{Deserialize, Serialize};

use super::report::RouteBytes;
use crate::cli::flags::Shared;

/// The graphs of one lane.
struct Graphs {
    dispatch: SessionGraph,
    combine: SessionGraph,
    /// A graph names the handle it was captured with, so the handle lives as long.
    _handle: DispatchHandle,
}

/// A rank's events and graphs.
pub(super) struct RankBench<'a> {
    flags: &'a Shared,
    start: Event,
    end: Event,
    /// Per lane; empty without `--graph`.
    graphs: Vec<Graphs>,
}

impl<'a> RankBench<'a> {
    /// Captures what the flags want captured.
    pub(super) fn new(flags: &'a Shared, rank: &RigRank) -> Result<Self, Error> {
        let gpu = rank.session.gpu();
        let mut bench = Self { flags, start: gpu.event(), end: gpu.event(), graphs: Vec::new() };
        if flags.graph {
            let graphs = (0..flags.shape.lanes).map(|lane| bench.capture(rank, Lane(lane)));
            bench.graphs = graphs.collect::<Result<_, _>>()?;
        }
        Ok(bench)
    }

    fn halves(&self) -> Halves {
        if self.flags.hooks { Halves::Send } else { Halves::Both }
    }

    fn dispatch(&self, rank: &RigRank, lane: Lane) -> Result<DispatchHandle, Error> {
        let (session, stream, tensors) = (&rank.session, &rank.stream, &rank.tensors);
        let call = DispatchCall {
            num_topk: self.flags.shape.topk,
            topk_dtype: TopkDtype::I32,
            with_weights: true,
            halves: self.halves(),
        };
        let handle = session.dispatch(lane, stream, tensors, &call)?;
        if self.flags.hooks {
            session.dispatch_receive(&handle, stream, tensors)?;
        }
        Ok(handle)
    }

    fn combine(&self, rank: &RigRank, handle: &DispatchHandle) -> Result<(), Error> {
        let (session, stream, tensors) = (&rank.session, &rank.stream, &rank.tensors);
        let source = CombineSource::ZeroCopy;
        let ticket = session.combine(handle, stream, tensors, source, self.halves())?;
        if self.flags.hooks {
            session.combine_receive(handle, &ticket, stream)?;
        }
        Ok(())
    }

    fn capture(&self, rank: &RigRank, lane: Lane) -> Result<Graphs, Error> {
        rank.session.begin_capture(&rank.stream)?;
        let handle = self.dispatch(rank, lane)?;
        let dispatch = rank.session.end_capture()?;
        rank.session.begin_capture(&rank.stream)?;
        self.combine(rank, &handle)?;
        let combine = rank.session.end_capture()?;
        Ok(Graphs { dispatch, combine, _handle: handle })
    }

    /// Copies one step's input in; what an earlier step left in the small outputs is wiped if it will be checked.
    pub(super) fn load(&self, rank: &RigRank, input: &RankInput) -> Result<(), Error> {
        rank.load(input, TopkDtype::I32)?;
        if self.flags.check { rank.wipe_outputs() } else { Ok(()) }
    }

    /// Launches a dispatch between the two events; a replayed one has no handle of its own.
    pub(super) fn start_dispatch(&self, rank: &RigRank, lane: Lane) -> Result<Option<DispatchHandle>, Error> {
        let gpu = rank.session.gpu();
        gpu.record(&self.start, &rank.stream)?;
        let handle = match self.graphs.get(lane.index()) {
            Some(graphs) => {
                rank.session.replay(&graphs.dispatch, &rank.stream)?;
                None
            }
            None => Some(self.dispatch(rank, lane)?),
        };
        gpu.record(&self.end, &rank.stream)?;
        Ok(handle)
    }

    /// Launches the combine that answers it.
    pub(super) fn start_combine(
        &self,
        rank: &RigRank,
        lane: Lane,
        handle: Option<&DispatchHandle>,
    ) -> Result<(), Error> {
        let gpu = rank.session.gpu();
        gpu.record(&self.start, &rank.stream)?;
        match (self.graphs.get(lane.index()), handle) {
            (Some(graphs), _) => rank.session.replay(&graphs.combine, &rank.stream)?,
            (None, Some(handle)) => self.combine(rank, handle)?,
            (None, None) => {}
        }
        Ok(gpu.record(&self.end, &rank.stream)?)
    }

    /// Microseconds between the two events.
    pub(super) fn elapsed_us(&self, rank: &RigRank) -> Result<f64, Error> {
        Ok(rank.session.gpu().elapsed_ns(&self.start, &self.end)? as f64 / 1e3)
    }
}

/// Checks every output of one rank.
pub(super) fn check(
    rank: &RigRank,
    step: &Step<'_>,
    input: &RankInput,
    alive: &[bool],
) -> Result<Verdict, Error> {
    let dispatched = rank.check_dispatch(step)?;
    // A pick lost in dispatch is reported, and counted, after combine.
    let mut verdict = Verdict { lost: 0, ..dispatched };
    verdict += rank.check_combine(step, input, alive)?;
    Ok(verdict)
}

/// Picks that one rank's last combine did not sum.
pub(super) fn count_losses(rank: &RigRank, input: &RankInput) -> Result<u64, Error> {
    let bits = rank.lost_topk(input.num_tokens)?;
    Ok(bits.iter().map(|bits| u64::from(bits.count_ones())).sum())
}

/// Flips one bit of the first output: a test of the check itself.
pub(super) fn flip_bit(rank: &RigRank) -> Result<(), Error> {
    let (gpu, addr) = (rank.session.gpu(), rank.tensors.out.addr());
    let mut byte = [0];
    gpu.read(addr, &mut byte)?;
    Ok(gpu.write(addr, &[byte[0] ^ 0x40])?)
}

/// What devices did with packets; all zero on a fabric that carries none.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct PacketTotals {
    pub(super) sent: u64,
    /// Packets of requests sent again.
    pub(super) sent_again: u64,
    pub(super) received: u64,
    /// Of those received, dropped because their checksum is wrong.
    pub(super) bad_icrc: u64,
}

/// What emulated devices saw.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct SeenTotals {
    pub(super) wqes: u64,
    pub(super) doorbells: u64,
    pub(super) cqes: u64,
    pub(super) unrung_wqes: u64,
}

/// What ranks moved and hold, over a whole run.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Totals {
    pub(super) bytes: RouteBytes,
    /// Absent where devices do not tell.
    pub(super) seen: Option<SeenTotals>,
    pub(super) packets: PacketTotals,
    /// Of the switches at the ranks' exits; absent where no plan was given.
    pub(super) fault_counts: Option<FaultCounts>,
    /// Of the rank that has most.
    pub(super) buffer_bytes: u64,
    /// Of the rank that has most.
    pub(super) tensor_bytes: u64,
}

impl Totals {
    /// One rank's. What its device saw, signs of life included, is a witness apart from the kernels that posted; only
    /// emulated devices tell.
    pub(super) fn of(rank: &RigRank, device: Option<&EmulatedHca>) -> Result<Self, Error> {
        let telemetry = rank.session.telemetry()?;
        let seen = device.map(EmulatedHca::counters);
        let packets = seen.map(|seen| seen.packets).unwrap_or_default();
        Ok(Self {
            bytes: RouteBytes {
                local: telemetry.total(|peer| peer.bytes_local),
                peer: telemetry.total(|peer| peer.bytes_mapped),
                rdma: telemetry.total(|peer| peer.bytes_rdma),
            },
            seen: seen.map(|seen| SeenTotals {
                wqes: seen.wqes,
                doorbells: seen.doorbells,
                cqes: seen.cqes,
                unrung_wqes: seen.unrung_wqes,
            }),
            packets: PacketTotals {
                sent: packets.sent,
                sent_again: packets.sent_again,
                received: packets.received,
                bad_icrc: packets.bad_icrc,
            },
            fault_counts: None,
            buffer_bytes: rank.session.buffer_bytes(),
            tensor_bytes: rank.session.tensor_bytes(),
        })
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.bytes.local += other.bytes.local;
        self.bytes.peer += other.bytes.peer;
        self.bytes.rdma += other.bytes.rdma;
        if let Some(other) = other.seen {
            let seen = self.seen.get_or_insert_default();
            seen.wqes += other.wqes;
            seen.doorbells += other.doorbells;
            seen.cqes += other.cqes;
            seen.unrung_wqes += other.unrung_wqes;
        }
        self.packets.sent += other.packets.sent;
        self.packets.sent_again += other.packets.sent_again;
        self.packets.received += other.packets.received;
        self.packets.bad_icrc += other.packets.bad_icrc;
        if let Some(counts) = other.fault_counts {
            *self.fault_counts.get_or_insert_default() += counts;
        }
        self.buffer_bytes = self.buffer_bytes.max(other.buffer_bytes);
        self.tensor_bytes = self.tensor_bytes.max(other.tensor_bytes);
    }
}
