//! `ibex bench ep`: dispatch, stand-in expert, combine, on every rank of a group in this process.
//!
//! A run owns the rig (world, tensors, streams), the captured graphs and the samples. Inputs, routes,
//! weights and masked picks are new in every step. A step's time is that of its slowest rank, from the
//! launch on its stream to the end of its last kernel.
//!
//! INVARIANT: with `--check` every step is verified on every rank, warm-up included, and what an earlier
//! step left in the small outputs is wiped before.

use core::time::Duration;
use std::path::PathBuf;

use ibex::config::ValidConfig;
use ibex::error::Error;
use ibex::gpu::Event;
use ibex::harness::{Rig, RigRank, on_all_cores};
use ibex::ids::{Lane, Rank};
use ibex::reference::check::{Step, Verdict};
use ibex::reference::inputs::{InputKey, RankInput};
use ibex::session::{
    CombineSource, DispatchCall, DispatchHandle, Halves, SessionGraph, TopkDtype, WorldOptions,
};
use ibex::time::sleep;
use ibex_hca::emulated::Doorbells;

use super::commit::commit;
use super::floor::Floor;
use super::moved::Moved;
use super::report::{Pair, Report, RouteBytes, draw, print};
use super::stats::{Percentiles, median};
use crate::cli::flags::{ConfigReport, FabricKind, Shared};
use crate::cli::progress::Progress;
use crate::cli::{CliError, Outcome, claim_output, write_output};

/// Far longer than a host needs to post one sign of life.
const QUIET: Duration = Duration::from_millis(5);

/// Flags of `bench ep`.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    shared: Shared,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a latency histogram as SVG.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Flip one bit of one output of rank 0 in every step, before it is checked: a test of the check itself.
    #[arg(long, hide = true, requires = "check")]
    corrupt: bool,
}

/// What a run measured.
#[derive(Default)]
struct Samples {
    dispatch_us: Vec<f64>,
    combine_us: Vec<f64>,
    dispatch_floor_us: Vec<f64>,
    combine_floor_us: Vec<f64>,
    verdict: Verdict,
}

/// Runs the benchmark and reports.
pub(super) fn run(args: &Args) -> Result<Outcome, CliError> {
    let config = args.shared.config()?;
    claim_output(args.json.as_deref())?;
    claim_output(args.plot.as_deref())?;
    let bench = Bench::new(&args.shared, config, args.corrupt)?;
    let samples = bench.run()?;
    bench.end();
    let report = bench.report(&samples)?;
    print(&report, samples.verdict.checked);
    if let Some(path) = &args.json {
        // PANIC: numbers, strings and named fields always serialise.
        let json = serde_json::to_string_pretty(&report).expect("a report is plain data");
        write_output(path, &format!("{json}\n"))?;
    }
    if let Some(path) = &args.plot {
        write_output(path, &draw(&args.shared, &samples.dispatch_us, &samples.combine_us))?;
    }
    let wrong = report.wrong + report.lost + report.unrung_wqes;
    Ok(if wrong == 0 { Outcome::Good } else { Outcome::Wrong })
}

/// The graphs of one rank and lane.
struct Graphs {
    dispatch: SessionGraph,
    combine: SessionGraph,
    /// A graph names the handle it was captured with, so the handle lives as long.
    _handle: DispatchHandle,
}

/// The events around one rank's operation.
struct Clock {
    start: Event,
    end: Event,
}

struct Bench<'a> {
    flags: &'a Shared,
    /// Outputs are corrupted before they are checked.
    corrupt: bool,
    /// Per rank.
    clocks: Vec<Clock>,
    /// Per lane and rank; empty without `--graph`.
    graphs: Vec<Vec<Graphs>>,
    rig: Rig,
}

impl<'a> Bench<'a> {
    fn new(flags: &'a Shared, config: ValidConfig, corrupt: bool) -> Result<Self, Error> {
        let is_simulation = flags.machine.fabric == FabricKind::Sim;
        let options = WorldOptions {
            doorbells: if flags.check { Doorbells::Strict } else { Doorbells::Record },
            simulation: is_simulation.then_some(flags.seed),
            ..WorldOptions::default()
        };
        let rig = Rig::new(&config, &options)?;
        let clock = |rank: &RigRank| {
            let gpu = rank.session.gpu();
            Clock { start: gpu.event(), end: gpu.event() }
        };
        let clocks = rig.ranks().iter().map(clock).collect();
        let mut bench = Self { flags, corrupt, clocks, graphs: Vec::new(), rig };
        if flags.graph {
            for lane in (0..flags.lanes).map(Lane) {
                let capture = |rank| bench.capture(rank, lane);
                let graphs = bench.rig.ranks().iter().map(capture).collect::<Result<_, _>>()?;
                bench.graphs.push(graphs);
            }
        }
        Ok(bench)
    }

    fn call(&self) -> DispatchCall {
        DispatchCall {
            num_topk: self.flags.topk,
            topk_dtype: TopkDtype::I32,
            with_weights: true,
            halves: self.halves(),
        }
    }

    fn halves(&self) -> Halves {
        if self.flags.hooks { Halves::Send } else { Halves::Both }
    }

    fn dispatch(&self, rank: &RigRank, lane: Lane) -> Result<DispatchHandle, Error> {
        let (session, stream, tensors) = (&rank.session, &rank.stream, &rank.tensors);
        let handle = session.dispatch(lane, stream, tensors, &self.call())?;
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

    fn run(&self) -> Result<Samples, Error> {
        let mut samples = Samples::default();
        let mut floor = (self.flags.machine.fabric == FabricKind::Inproc).then(Floor::new);
        let total = self.flags.warmup + self.flags.iters;
        let mut progress = Progress::new("step", total);
        for iteration in 0..total {
            let inputs = self.inputs(iteration);
            let (dispatch_us, combine_us) = self.step(iteration, &inputs, &mut samples.verdict)?;
            if iteration >= self.flags.warmup {
                samples.dispatch_us.push(dispatch_us);
                samples.combine_us.push(combine_us);
                if let Some(floor) = &mut floor {
                    let moved = Moved::new(self.rig.config(), &inputs);
                    samples.dispatch_floor_us.push(floor.measure_us(&moved.dispatch));
                    samples.combine_floor_us.push(floor.measure_us(&moved.combine));
                }
            }
            progress.step(iteration + 1);
        }
        Ok(samples)
    }

    /// One step of all ranks; returns the times of its slowest rank.
    fn step(&self, iteration: u32, inputs: &[RankInput], verdict: &mut Verdict) -> Result<(f64, f64), Error> {
        let lane = Lane(iteration % self.flags.lanes);
        for (rank, input) in self.rig.ranks().iter().zip(inputs) {
            rank.load(input, TopkDtype::I32)?;
            if self.flags.check {
                rank.wipe_outputs()?;
            }
        }
        let mut handles = Vec::new();
        let dispatch_us = self.timed(|index, rank| {
            match self.graphs.get(lane.index()) {
                Some(graphs) => rank.session.replay(&graphs[index].dispatch, &rank.stream)?,
                None => handles.push(self.dispatch(rank, lane)?),
            }
            Ok(())
        })?;
        for rank in self.rig.ranks() {
            rank.session.run_expert(&rank.stream, &rank.tensors)?;
        }
        self.rig.synchronize()?;
        let combine_us = self.timed(|index, rank| match self.graphs.get(lane.index()) {
            Some(graphs) => rank.session.replay(&graphs[index].combine, &rank.stream),
            None => self.combine(rank, &handles[index]),
        })?;
        if self.corrupt {
            flip_bit(&self.rig.ranks()[0])?;
        }
        if self.flags.check {
            *verdict += self.check(inputs)?;
        } else {
            verdict.lost += self.count_losses(inputs)?;
        }
        Ok((dispatch_us, combine_us))
    }

    /// Launches an operation on every rank and waits; microseconds of the slowest rank.
    fn timed(&self, mut launch: impl FnMut(usize, &RigRank) -> Result<(), Error>) -> Result<f64, Error> {
        for (index, (rank, clock)) in self.rig.ranks().iter().zip(&self.clocks).enumerate() {
            rank.session.gpu().record(&clock.start, &rank.stream)?;
            launch(index, rank)?;
            rank.session.gpu().record(&clock.end, &rank.stream)?;
        }
        self.rig.synchronize()?;
        let mut slowest_ns = 0;
        for (rank, clock) in self.rig.ranks().iter().zip(&self.clocks) {
            slowest_ns = slowest_ns.max(rank.session.gpu().elapsed_ns(&clock.start, &clock.end)?);
        }
        Ok(slowest_ns as f64 / 1e3)
    }

    /// The inputs of all ranks, drawn on all cores.
    fn inputs(&self, iteration: u32) -> Vec<RankInput> {
        let (flags, config) = (self.flags, self.rig.config());
        let draw = |index: usize| {
            // CAST: at most 512 ranks.
            let rank = Rank(index as u16);
            let key = InputKey { seed: flags.seed, iteration: iteration.into(), rank };
            RankInput::generate(config, flags.routing, key, flags.tokens)
        };
        on_all_cores(self.rig.ranks().len(), draw)
    }

    /// Checks every output of every rank, on all cores.
    fn check(&self, inputs: &[RankInput]) -> Result<Verdict, Error> {
        let step = Step::new(self.rig.config(), inputs);
        let alive = vec![true; inputs.len()];
        let ranks = self.rig.ranks();
        let check = |index: usize| -> Result<Verdict, Error> {
            let dispatched = ranks[index].check_dispatch(&step)?;
            // A pick lost in dispatch is reported, and counted, after combine.
            let mut verdict = Verdict { lost: 0, ..dispatched };
            verdict += ranks[index].check_combine(&step, &inputs[index], &alive)?;
            Ok(verdict)
        };
        let mut total = Verdict::default();
        for verdict in on_all_cores(ranks.len(), check) {
            total += verdict?;
        }
        Ok(total)
    }

    fn count_losses(&self, inputs: &[RankInput]) -> Result<u64, Error> {
        let mut lost = 0;
        for (rank, input) in self.rig.ranks().iter().zip(inputs) {
            let bits = rank.lost_topk(input.num_tokens)?;
            lost += bits.iter().map(|bits| u64::from(bits.count_ones())).sum::<u64>();
        }
        Ok(lost)
    }

    /// Lets devices look for WQEs that no doorbell covers, once nobody posts any more.
    fn end(&self) {
        let world = self.rig.world();
        for rank in self.rig.ranks() {
            world.set_silent(rank.rank(), true);
        }
        // A sign of life that was being sent when its rank fell silent is out by then.
        sleep(QUIET);
        for device in world.devices() {
            device.check_unrung();
        }
    }

    fn report(&self, samples: &Samples) -> Result<Report, Error> {
        let sessions = self.rig.world().sessions();
        let mut bytes = RouteBytes::default();
        let (mut wqes, mut doorbells, mut cqes) = (0, 0, 0);
        for session in sessions {
            let telemetry = session.telemetry()?;
            bytes.local += telemetry.total(|peer| peer.bytes_local);
            bytes.peer += telemetry.total(|peer| peer.bytes_mapped);
            bytes.rdma += telemetry.total(|peer| peer.bytes_rdma);
        }
        // What devices saw, signs of life included: a witness apart from the kernels that posted.
        let mut unrung_wqes = 0;
        for device in self.rig.world().devices() {
            let seen = device.counters();
            wqes += seen.wqes;
            doorbells += seen.doorbells;
            cqes += seen.cqes;
            unrung_wqes += seen.unrung_wqes;
        }
        let floor =
            Pair { dispatch: median(&samples.dispatch_floor_us), combine: median(&samples.combine_floor_us) };
        Ok(Report {
            config: ConfigReport::new(self.flags, self.rig.config()),
            provider: self.flags.machine.provider_name(),
            gpu: self.flags.machine.gpu_name(),
            fabric: self.flags.machine.fabric_name(),
            commit: commit(),
            seed: self.flags.seed,
            dispatch_us: Percentiles::of(&samples.dispatch_us),
            combine_us: Percentiles::of(&samples.combine_us),
            wrong: samples.verdict.wrong,
            lost: samples.verdict.lost,
            bytes,
            buffer_bytes: sessions.iter().map(|s| s.buffer_bytes()).max().unwrap_or(0),
            tensor_bytes: sessions.iter().map(|s| s.tensor_bytes()).max().unwrap_or(0),
            wqes,
            doorbells,
            cqes,
            unrung_wqes,
            memcpy_floor_us: floor,
            floor_ratio: Pair {
                dispatch: self.ratio(&samples.dispatch_us, floor.dispatch),
                combine: self.ratio(&samples.combine_us, floor.combine),
            },
        })
    }

    /// Median over floor; a step that moves nothing has none.
    fn ratio(&self, samples_us: &[f64], floor_us: Option<f64>) -> Option<f64> {
        if self.flags.tokens == 0 {
            return None;
        }
        Some(median(samples_us)? / floor_us.filter(|floor| *floor > 0.0)?)
    }
}

/// Flips one bit of the first output.
fn flip_bit(rank: &RigRank) -> Result<(), Error> {
    let (gpu, addr) = (rank.session.gpu(), rank.tensors.out.addr());
    let mut byte = [0];
    gpu.read(addr, &mut byte)?;
    Ok(gpu.write(addr, &[byte[0] ^ 0x40])?)
}
