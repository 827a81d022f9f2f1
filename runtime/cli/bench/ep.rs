//! `ibex bench ep`: dispatch, stand-in expert, combine, on every rank of a group in this process.
//!
//! A run owns the rig (world, tensors, streams), the captured graphs and the samples. Inputs, routes,
//! weights and masked picks are new in every step. A step's time is that of its slowest rank, from the
//! launch on its stream to the end of its last kernel.
//!
//! INVARIANT: with `--check` every step is verified on every rank, warm-up included, and what an earlier
//! step left in the small outputs is wiped before.

use core::time::Duration;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::thread;

use ibex::config::{CombineMode, ValidConfig};
use ibex::error::Error;
use ibex::gpu::Event;
use ibex::harness::{Rig, RigRank};
use ibex::ids::{Lane, Rank};
use ibex::layout::Plan;
use ibex::reference::check::{Step, Verdict};
use ibex::reference::inputs::{InputKey, RankInput};
use ibex::session::{
    CombineSource, DispatchCall, DispatchHandle, Halves, SessionGraph, TopkDtype, WorldOptions,
};
use ibex::time::sleep;
use ibex_hca::emulated::Doorbells;
use serde::Serialize;

use super::commit::commit;
use super::floor::{Floor, Stage};
use super::stats::{Percentiles, median};
use crate::cli::flags::{ConfigReport, FabricKind, Shared};
use crate::cli::plot::{self, Series};
use crate::cli::progress::Progress;
use crate::cli::table::{self, Table};
use crate::cli::{CliError, Outcome, claim_output, write_output};

/// Far longer than a host needs to post one sign of life.
const QUIET: Duration = Duration::from_millis(5);
/// Bytes of a packed row's source info, which is an output like the row itself.
const SOURCE_INFO_LEN: usize = 16;

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
}

/// The machine-readable report; keys are part of the interface.
#[derive(Debug, Serialize)]
struct Report {
    config: ConfigReport,
    provider: &'static str,
    gpu: &'static str,
    fabric: &'static str,
    commit: Option<String>,
    seed: u64,
    dispatch_us: Option<Percentiles>,
    combine_us: Option<Percentiles>,
    wrong: u64,
    lost: u64,
    bytes: RouteBytes,
    buffer_bytes: u64,
    tensor_bytes: u64,
    wqes: u64,
    doorbells: u64,
    cqes: u64,
    unrung_wqes: u64,
    memcpy_floor_us: Pair,
    floor_ratio: Pair,
}

/// Payload bytes by route, over the whole run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct RouteBytes {
    local: u64,
    peer: u64,
    rdma: u64,
}

/// One number per operation; absent where it has no meaning.
#[derive(Clone, Copy, Debug, Serialize)]
struct Pair {
    dispatch: Option<f64>,
    combine: Option<f64>,
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
    let bench = Bench::new(&args.shared, config)?;
    let samples = bench.run()?;
    bench.end();
    let report = bench.report(&samples)?;
    print(&report, &samples);
    if let Some(path) = &args.json {
        // PANIC: numbers, strings and named fields always serialise.
        let json = serde_json::to_string_pretty(&report).expect("a report is plain data");
        write_output(path, &format!("{json}\n"))?;
    }
    if let Some(path) = &args.plot {
        write_output(path, &draw(&args.shared, &samples))?;
    }
    let wrong = report.wrong + report.lost + report.unrung_wqes;
    Ok(if wrong == 0 {
        Outcome::Good
    } else {
        Outcome::Wrong
    })
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
    /// Per rank.
    clocks: Vec<Clock>,
    /// Per lane and rank; empty without `--graph`.
    graphs: Vec<Vec<Graphs>>,
    rig: Rig,
}

impl<'a> Bench<'a> {
    fn new(flags: &'a Shared, config: ValidConfig) -> Result<Self, Error> {
        let is_simulation = flags.machine.fabric == FabricKind::Sim;
        let options = WorldOptions {
            doorbells: if flags.check {
                Doorbells::Strict
            } else {
                Doorbells::Record
            },
            simulation: is_simulation.then_some(flags.seed),
            ..WorldOptions::default()
        };
        let rig = Rig::new(&config, &options)?;
        let clock = |rank: &RigRank| {
            let gpu = rank.session.gpu();
            Clock {
                start: gpu.event(),
                end: gpu.event(),
            }
        };
        let clocks = rig.ranks().iter().map(clock).collect();
        let mut bench = Self {
            flags,
            clocks,
            graphs: Vec::new(),
            rig,
        };
        if flags.graph {
            for lane in (0..flags.lanes).map(Lane) {
                let capture = |rank| bench.capture(rank, lane);
                let graphs = bench
                    .rig
                    .ranks()
                    .iter()
                    .map(capture)
                    .collect::<Result<_, _>>()?;
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
        if self.flags.hooks {
            Halves::Send
        } else {
            Halves::Both
        }
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
        Ok(Graphs {
            dispatch,
            combine,
            _handle: handle,
        })
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
                    samples
                        .dispatch_floor_us
                        .push(floor.measure_us(&moved.dispatch));
                    samples
                        .combine_floor_us
                        .push(floor.measure_us(&moved.combine));
                }
            }
            progress.step(iteration + 1);
        }
        Ok(samples)
    }

    /// One step of all ranks; returns the times of its slowest rank.
    fn step(
        &self,
        iteration: u32,
        inputs: &[RankInput],
        verdict: &mut Verdict,
    ) -> Result<(f64, f64), Error> {
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
        if self.flags.check {
            *verdict += self.check(inputs)?;
        } else {
            verdict.lost += self.count_losses(inputs)?;
        }
        Ok((dispatch_us, combine_us))
    }

    /// Launches an operation on every rank and waits; microseconds of the slowest rank.
    fn timed(
        &self,
        mut launch: impl FnMut(usize, &RigRank) -> Result<(), Error>,
    ) -> Result<f64, Error> {
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
            let key = InputKey {
                seed: flags.seed,
                iteration: iteration.into(),
                rank,
            };
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
            let mut verdict = Verdict {
                lost: 0,
                ..dispatched
            };
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
            lost += bits
                .iter()
                .map(|bits| u64::from(bits.count_ones()))
                .sum::<u64>();
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
        let floor = Pair {
            dispatch: median(&samples.dispatch_floor_us),
            combine: median(&samples.combine_floor_us),
        };
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

/// Applies `work` to `0..count` on as many threads as there are cores; results in order.
fn on_all_cores<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let share = count.div_ceil(cores).max(1);
    let work = &work;
    thread::scope(|scope| {
        let part = |from: usize| {
            let until = (from + share).min(count);
            scope.spawn(move || (from..until).map(work).collect::<Vec<T>>())
        };
        let workers: Vec<_> = (0..count).step_by(share).map(part).collect();
        // PANIC: a panic of the reference is a broken invariant of ours and goes on.
        workers
            .into_iter()
            .flat_map(|worker| worker.join().expect("the reference does not panic"))
            .collect()
    })
}

/// The bytes that a step must move, as chains of copies.
struct Moved {
    dispatch: Vec<Stage>,
    combine: Vec<Stage>,
}

impl Moved {
    fn new(config: &ValidConfig, inputs: &[RankInput]) -> Self {
        let routes = Routes::count(config, inputs);
        let layout = Plan::new(config, Rank(0)).layout;
        let message_len = layout.message_stride as usize;
        let packed_len = (layout.payload_bytes + layout.scale_bytes) as usize + SOURCE_INFO_LEN;
        let row_len = layout.row_bytes as usize;
        let stage = |piece_len, num_pieces| Stage {
            piece_len,
            num_pieces,
        };
        let output = stage(row_len, routes.tokens);
        Self {
            dispatch: vec![
                stage(message_len, routes.tokens),
                stage(message_len, routes.messages),
                stage(packed_len, routes.rows),
            ],
            combine: match config.combine {
                // Rows leave from the expert's output itself: nothing is staged.
                CombineMode::Exact => vec![stage(row_len, routes.picks), output],
                CombineMode::Reduced => {
                    let row = stage(row_len, routes.messages);
                    vec![row, row, output]
                }
            },
        }
    }
}

/// How often tokens cross.
#[derive(Debug, Default, PartialEq, Eq)]
struct Routes {
    /// Tokens of all ranks.
    tokens: usize,
    /// Pairs of a token and a rank that serves at least one of its picks.
    messages: usize,
    /// Pairs of a token and an expert that it picks.
    rows: usize,
    /// Picks that somebody serves.
    picks: usize,
}

impl Routes {
    fn count(config: &ValidConfig, inputs: &[RankInput]) -> Self {
        let mut routes = Self::default();
        for input in inputs {
            routes.tokens += input.num_tokens as usize;
            for token in 0..input.num_tokens {
                let mut experts: Vec<u16> = input
                    .picks(token)
                    .iter()
                    .filter_map(|&pick| u16::try_from(pick).ok())
                    .collect();
                routes.picks += experts.len();
                experts.sort_unstable();
                experts.dedup();
                routes.rows += experts.len();
                let owner = |&expert: &u16| config.owner_of(ibex::ids::ExpertIdx(expert));
                // Experts are contiguous per rank, so equal owners stand side by side.
                let mut owners: Vec<Rank> = experts
                    .iter()
                    .filter_map(owner)
                    .map(|(rank, _)| rank)
                    .collect();
                owners.dedup();
                routes.messages += owners.len();
            }
        }
        routes
    }
}

fn print(report: &Report, samples: &Samples) {
    let mut times = Table::new(&[
        "us, slowest rank",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "memcpy floor",
        "ratio",
    ]);
    let operations = [
        (
            "dispatch",
            report.dispatch_us,
            report.memcpy_floor_us.dispatch,
            report.floor_ratio.dispatch,
        ),
        (
            "combine",
            report.combine_us,
            report.memcpy_floor_us.combine,
            report.floor_ratio.combine,
        ),
    ];
    for (name, percentiles, floor, ratio) in operations {
        let Some(p) = percentiles else { continue };
        let shown =
            |value: Option<f64>, digits| value.map_or("-".into(), |v| format!("{v:.digits$}"));
        times.row(
            [name.to_string()]
                .into_iter()
                .chain([p.p50, p.p90, p.p99, p.p999].map(|us| format!("{us:.0}")))
                .chain([shown(floor, 0), shown(ratio, 2)]),
        );
    }
    print!("{times}");
    let bytes = report.bytes;
    println!(
        "moved     local {}, peer {}, rdma {}",
        table::bytes(bytes.local),
        table::bytes(bytes.peer),
        table::bytes(bytes.rdma)
    );
    println!(
        "device    {} wqes, {} doorbells, {} cqes, {} unrung wqes",
        report.wqes, report.doorbells, report.cqes, report.unrung_wqes
    );
    println!(
        "memory    {} of buffers, {} of tensors, per rank",
        table::bytes(report.buffer_bytes),
        table::bytes(report.tensor_bytes)
    );
    match samples.verdict.checked {
        0 => println!("result    not checked, {} picks lost", report.lost),
        checked => println!(
            "result    {checked} rows and outputs checked: {} wrong, {} picks lost",
            report.wrong, report.lost
        ),
    }
}

fn draw(flags: &Shared, samples: &Samples) -> String {
    let title = format!("Dispatch and combine, EP{}", flags.ranks);
    let shape = format!(
        "{} tokens per rank, hidden {}, top-{} of {} experts, {} dispatch, {} combine, {} routing",
        flags.tokens,
        flags.hidden,
        flags.topk,
        flags.experts,
        flags.dtype,
        flags.combine,
        flags.routing
    );
    let machine = format!(
        "{} hca, {} gpu, {} fabric, route {}, signal {}, link {}",
        flags.machine.provider_name(),
        flags.machine.gpu_name(),
        flags.machine.fabric_name(),
        flags.route,
        flags.signal,
        flags.machine.link
    );
    let series = [
        Series {
            name: "dispatch",
            samples_us: &samples.dispatch_us,
        },
        Series {
            name: "combine",
            samples_us: &samples.combine_us,
        },
    ];
    plot::histogram(&title, [&shape, &machine], &series)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ibex::config::Config;

    fn input(topk_idx: &[i32]) -> RankInput {
        RankInput {
            num_tokens: topk_idx.len() as u32 / 4,
            num_topk: 4,
            topk_idx: topk_idx.to_vec(),
            ..RankInput::default()
        }
    }

    #[test]
    fn the_floor_counts_each_crossing_once() {
        let config = Config {
            num_ranks: 2,
            num_experts: 6,
            max_topk: 4,
            ..Config::default()
        };
        let config = config.validate().unwrap();
        // Experts 0..3 on rank 0, 3..6 on rank 1.
        let inputs = [input(&[0, 1, 2, -1, 0, 3, 3, 5]), input(&[])];
        let routes = Routes::count(&config, &inputs);
        assert_eq!(
            routes,
            Routes {
                tokens: 2,
                messages: 3,
                rows: 6,
                picks: 7
            }
        );
        let moved = Moved::new(&config, &inputs);
        let pieces = |stages: &[Stage]| stages.iter().map(|s| s.num_pieces).collect::<Vec<_>>();
        assert_eq!(
            (pieces(&moved.dispatch), pieces(&moved.combine)),
            (vec![2, 3, 6], vec![7, 2])
        );
        assert_eq!(moved.dispatch[2].piece_len, 7168 + 56 * 4 + 16);
        assert_eq!(moved.combine[0].piece_len, 14336);
    }

    #[test]
    fn work_on_all_cores_keeps_its_order() {
        for count in [0, 1, 7, 64] {
            let squares: Vec<usize> = on_all_cores(count, |i| i * i);
            assert_eq!(squares, (0..count).map(|i| i * i).collect::<Vec<_>>());
        }
    }
}
