//! `ibex bench ep`: dispatch, stand-in expert, combine, on every rank of a group.
//!
//! A run owns the rig (world, tensors, streams), the captured graphs and the samples. Inputs, routes,
//! weights and masked picks are new in every step. A step's time is that of its slowest rank, from the
//! launch on its stream to the end of its last kernel; on a GPU the streams of all ranks start together.
//! All ranks live in this process, or each in one of its own (`procs`).
//!
//! INVARIANT: with `--check` every step is verified on every rank, warm-up included, and what an earlier
//! step left in the small outputs is wiped before.

use core::time::Duration;
use std::path::PathBuf;
use std::sync::Arc;

use ibex::bootstrap::Place;
use ibex::config::ValidConfig;
use ibex::error::Error;
use ibex::gpu::CudaGpu;
use ibex::gpu::cuda::Gate;
use ibex::harness::{Rig, RigRank, on_all_cores};
use ibex::ids::{Lane, Rank};
use ibex::reference::check::{Step, Verdict};
use ibex::reference::inputs::{InputKey, RankInput};
use ibex::session::{DeviceWrapper, Gpus, WorldOptions};
use ibex::time::sleep;
use ibex_hca::emulated::Doorbells;

use super::moved::Moved;
use super::pcap::Pcap;
use super::procs;
use super::rank::{RankBench, Totals, check, count_losses, flip_bit};
use super::report::{Report, Samples, draw, print};
use super::yardstick::{Baseline, Yardsticks};
use crate::cli::flags::{FabricKind, Shared};
use crate::cli::progress::Progress;
use crate::cli::provider::{self, OpenGpus};
use crate::cli::{CliError, Outcome, claim_output, write_output};

/// Far longer than a host needs to post one sign of life.
pub(super) const QUIET: Duration = Duration::from_millis(5);

/// Flags of `bench ep`.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    pub(super) shared: Shared,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Write a latency histogram as SVG.
    #[arg(long, value_name = "FILE")]
    pub(super) plot: Option<PathBuf>,
    /// Write every packet of queue pairs, or what would have been one, for Wireshark; ranks with processes of their
    /// own write a file each, with the rank before the extension. Copies between ranks are none: see --route.
    #[arg(long, value_name = "FILE")]
    pub(super) pcap: Option<PathBuf>,
    /// Time somebody else's all-to-all of the same bytes beside each step; wants --gpu cuda.
    #[arg(long)]
    pub(super) baseline: Option<Baseline>,
    /// Flip one bit of one output of rank 0 in every step, before it is checked: a test of the check itself.
    #[arg(long, hide = true, requires = "check")]
    pub(super) corrupt: bool,
}

/// Runs the benchmark and reports.
pub(super) fn run(mut args: Args) -> Result<Outcome, CliError> {
    let place = Place::from_env().map_err(CliError::Place)?;
    let place = args.shared.take_place(place)?;
    let mut config = args.shared.config()?;
    if args.baseline.is_some() && !args.shared.machine.is_cuda() {
        let because = "NCCL moves memory of GPUs";
        return Err(CliError::Conflict { one: "--baseline nccl", other: "--gpu host", because });
    }
    let is_group = place.is_some() || args.shared.machine.procs;
    if args.baseline.is_some() && is_group {
        let because = "NCCL's ranks would be others than ours";
        return Err(CliError::Conflict { one: "--baseline nccl", other: "several processes", because });
    }
    if let Some(place) = place {
        let memory = provider::payload(&args.shared.machine, args.shared.route);
        let gpus = provider::open_gpu_of(&args.shared.machine, &place, memory)?;
        if let Some(gpu) = &gpus.shared {
            args.shared.shape.fill(gpu.info().sms);
            config = args.shared.config()?;
        }
        return procs::run_rank(&args, &config, &place, gpus.gpus);
    }
    claim_outputs(&args)?;
    if args.shared.machine.procs {
        // Each rank opens its own; one refusal is enough.
        provider::check_driver(&args.shared.machine)?;
        return procs::launch_ranks(&args);
    }
    let memory = provider::payload(&args.shared.machine, args.shared.route);
    let gpus = provider::open_gpus(&args.shared.machine, config.num_ranks, memory)?;
    let devices = provider::devices(&args.shared.machine, config.num_ranks, &gpus)?;
    if devices.is_given() && args.pcap.is_some() {
        let because = "packets of real devices are seen on the wire only";
        return Err(CliError::Conflict { one: "--pcap", other: "--provider mlx5", because });
    }
    let mut yardsticks = yardsticks(&args, &gpus)?;
    if let Some(gpu) = &gpus.shared {
        args.shared.shape.fill(gpu.info().sms);
        config = args.shared.config()?;
    }
    let start = Start::of(&gpus)?;
    let bench = Bench::new(&args.shared, config, devices.wrapper(), gpus.gpus, start, args.corrupt)?;
    if args.shared.machine.is_cuda() || args.shared.machine.is_mlx5() {
        let places = bench.rig.world().session(Rank(0)).places();
        println!("queues    {}", places.queues);
        println!("payload   {}", places.payload);
    }
    let (world, is_simulation) = (bench.rig.world(), args.shared.machine.fabric() == FabricKind::Sim);
    let pcap = Pcap::start(args.pcap.as_deref(), world, is_simulation)?;
    let samples = bench.run(&mut yardsticks)?;
    bench.end();
    pcap.map(Pcap::end).transpose()?;
    let report = Report::new(&args.shared, bench.rig.config(), None, &samples, &bench.totals()?);
    tell(&args, &report, &samples)
}

/// What is measured beside the steps: the device's copies where a GPU runs kernels, else the processor's.
fn yardsticks(args: &Args, gpus: &OpenGpus) -> Result<Yardsticks, CliError> {
    let Some(gpu) = &gpus.shared else {
        // Virtual time measures nothing.
        let is_real = args.shared.machine.fabric() == FabricKind::Inproc;
        return Ok(if is_real { Yardsticks::host() } else { Yardsticks::default() });
    };
    let mut yardsticks = Yardsticks::device(gpu);
    if args.baseline == Some(Baseline::Nccl) {
        yardsticks.add_nccl(gpu)?;
    }
    Ok(yardsticks)
}

/// Refuses report files that cannot be written, before the run.
pub(super) fn claim_outputs(args: &Args) -> Result<(), CliError> {
    claim_output(args.json.as_deref())?;
    claim_output(args.plot.as_deref())
}

/// Prints and writes the report of a run.
pub(super) fn tell(args: &Args, report: &Report, samples: &Samples) -> Result<Outcome, CliError> {
    print(report, samples.verdict.checked);
    if let Some(path) = &args.json {
        // PANIC: numbers, strings and named fields always serialise.
        let json = serde_json::to_string_pretty(report).expect("a report is plain data");
        write_output(path, &format!("{json}\n"))?;
    }
    if let Some(path) = &args.plot {
        write_output(path, &draw(&args.shared, &samples.dispatch_us, &samples.combine_us))?;
    }
    Ok(report.outcome())
}

/// How kernels of all ranks start together on a GPU: launching them takes the host longer than they take.
#[derive(Default)]
struct Start {
    /// None on the host, whose ranks share its cores anyway.
    gate: Option<Gate>,
    gpus: Vec<Arc<CudaGpu>>,
}

impl Start {
    fn of(gpus: &OpenGpus) -> Result<Self, CliError> {
        let gate = gpus.shared.as_ref().map(|gpu| gpu.gate()).transpose()?;
        Ok(Self { gate, gpus: gpus.each.clone() })
    }

    /// Holds a rank's stream back.
    fn hold(&self, rank: &RigRank) -> Result<(), Error> {
        if let (Some(gate), Some(gpu)) = (&self.gate, self.gpus.get(rank.rank().index())) {
            gate.hold(gpu, &rank.stream)?;
        }
        Ok(())
    }

    /// Lets all of them go on.
    fn go(&self) -> Result<(), Error> {
        if let Some(gate) = &self.gate {
            gate.open()?;
        }
        Ok(())
    }
}

struct Bench<'a> {
    // First: no stream is left behind it.
    start: Start,
    flags: &'a Shared,
    /// Outputs are corrupted before they are checked.
    corrupt: bool,
    /// Per rank.
    benches: Vec<RankBench<'a>>,
    rig: Rig,
}

impl<'a> Bench<'a> {
    fn new(
        flags: &'a Shared,
        config: ValidConfig,
        devices: DeviceWrapper,
        gpus: Gpus,
        start: Start,
        corrupt: bool,
    ) -> Result<Self, Error> {
        let is_simulation = flags.machine.fabric() == FabricKind::Sim;
        let options = WorldOptions {
            doorbells: if flags.check { Doorbells::Strict } else { Doorbells::Record },
            simulation: is_simulation.then_some(flags.seed),
            devices,
            gpus,
            ..WorldOptions::default()
        };
        let rig = Rig::new(&config, &options)?;
        let benches = rig.ranks().iter().map(|rank| RankBench::new(flags, rank)).collect::<Result<_, _>>()?;
        Ok(Self { start, flags, corrupt, benches, rig })
    }

    fn run(&self, yardsticks: &mut Yardsticks) -> Result<Samples, CliError> {
        let mut samples = Samples::default();
        let total = self.flags.warmup + self.flags.iters;
        let mut progress = Progress::new("step", total);
        for iteration in 0..total {
            let inputs = all_inputs(self.flags, self.rig.config(), iteration);
            let (dispatch_us, combine_us) = self.step(iteration, &inputs, &mut samples.verdict)?;
            if iteration >= self.flags.warmup {
                samples.dispatch_us.push(dispatch_us);
                samples.combine_us.push(combine_us);
                yardsticks.measure(&Moved::new(self.rig.config(), &inputs), &mut samples.measured)?;
            }
            progress.step(iteration + 1);
        }
        Ok(samples)
    }

    fn ranks(&self) -> impl Iterator<Item = (&RigRank, &RankBench<'a>)> {
        self.rig.ranks().iter().zip(&self.benches)
    }

    /// One step of all ranks; returns the times of its slowest rank.
    fn step(&self, iteration: u32, inputs: &[RankInput], verdict: &mut Verdict) -> Result<(f64, f64), Error> {
        let lane = Lane(iteration % self.flags.shape.lanes);
        for ((rank, bench), input) in self.ranks().zip(inputs) {
            bench.load(rank, input)?;
        }
        let mut handles = Vec::new();
        for (rank, bench) in self.ranks() {
            self.start.hold(rank)?;
            handles.push(bench.start_dispatch(rank, lane)?);
        }
        self.start.go()?;
        let dispatch_us = self.slowest_us()?;
        for rank in self.rig.ranks() {
            rank.session.run_expert(&rank.stream, &rank.tensors)?;
        }
        self.rig.synchronize()?;
        for ((rank, bench), handle) in self.ranks().zip(&handles) {
            self.start.hold(rank)?;
            bench.start_combine(rank, lane, handle.as_ref())?;
        }
        self.start.go()?;
        let combine_us = self.slowest_us()?;
        if self.corrupt {
            flip_bit(&self.rig.ranks()[0])?;
        }
        if self.flags.check {
            *verdict += self.check(inputs)?;
        } else {
            for (rank, input) in self.rig.ranks().iter().zip(inputs) {
                verdict.lost += count_losses(rank, input)?;
            }
        }
        Ok((dispatch_us, combine_us))
    }

    /// Waits for all ranks; microseconds of the slowest one.
    fn slowest_us(&self) -> Result<f64, Error> {
        self.rig.synchronize()?;
        let mut slowest = 0.0_f64;
        for (rank, bench) in self.ranks() {
            slowest = slowest.max(bench.elapsed_us(rank)?);
        }
        Ok(slowest)
    }

    /// Checks every output of every rank, on all cores.
    fn check(&self, inputs: &[RankInput]) -> Result<Verdict, Error> {
        let step = Step::new(self.rig.config(), inputs);
        let alive = vec![true; inputs.len()];
        let ranks = self.rig.ranks();
        let check = |index: usize| check(&ranks[index], &step, &inputs[index], &alive);
        let mut total = Verdict::default();
        for verdict in on_all_cores(ranks.len(), check) {
            total += verdict?;
        }
        Ok(total)
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

    fn totals(&self) -> Result<Totals, Error> {
        let mut totals = Totals::default();
        let devices = self.rig.world().devices();
        for (idx, rank) in self.rig.ranks().iter().enumerate() {
            totals += Totals::of(rank, devices.get(idx).map(|device| &**device))?;
        }
        Ok(totals)
    }
}

/// The inputs of all ranks in one step, drawn on all cores.
pub(super) fn all_inputs(flags: &Shared, config: &ValidConfig, iteration: u32) -> Vec<RankInput> {
    // CAST: at most 512 ranks.
    on_all_cores(config.num_ranks as usize, |index| input(flags, config, iteration, Rank(index as u16)))
}

/// The input of one rank in one step.
pub(super) fn input(flags: &Shared, config: &ValidConfig, iteration: u32, rank: Rank) -> RankInput {
    let key = InputKey { seed: flags.seed, iteration: iteration.into(), rank };
    RankInput::generate(config, flags.routing, key, flags.shape.tokens)
}
