//! `bench ep` with a process per rank: starting them, and what one of them does.
//!
//! A [`Run`] owns one rank: its [`Member`], tensors, stream and samples. All ranks draw the same inputs from the same
//! seed; each checks its own outputs. What one rank must know of another goes through the rendezvous between steps,
//! never while a step is timed. Rank 0 speaks for the group.
//!
//! INVARIANT: the floor is measured while every rank waits, so that it has all cores, as it has in one process.

use core::mem::discriminant;
use core::time::Duration;
use std::ffi::{OsStr, OsString};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ibex::bootstrap::{BootstrapError, Place, RankList};
use ibex::config::ValidConfig;
use ibex::error::Error;
use ibex::harness::RigRank;
use ibex::ids::{Lane, Rank};
use ibex::recovery::RouteReport;
use ibex::reference::check::{Step, Verdict};
use ibex::reference::inputs::RankInput;
use ibex::session::{Gpus, Member, MemberFabric, MemberOptions};
use ibex::time::sleep;
use ibex_hca::emulated::{Doorbells, UdpConfig};
use serde::{Deserialize, Serialize};

use super::ep::{Args, QUIET, all_inputs, claim_outputs, input, tell};
use super::moved::Moved;
use super::rank::{RankBench, Totals, check, count_losses, flip_bit};
use super::report::{Report, Samples};
use super::yardstick::Yardsticks;
use crate::cli::flags::{FabricKind, Shared};
use crate::cli::launch::{self, Ending, LaunchError, Output, Plan};
use crate::cli::progress::Progress;
use crate::cli::{CliError, Outcome};

/// How long ranks wait for each other between two parts of a run. Kernels end by limits of their own; this is for
/// machines that are busy with something else.
const PATIENCE: Duration = Duration::from_secs(600);

/// Starts this command again, once per rank; rank 0 has the terminal.
pub(super) fn launch_ranks(args: &Args) -> Result<Outcome, CliError> {
    let (flags, ranks) = (&args.shared, args.shared.ranks());
    let num_hosts = flags.machine.num_hosts(ranks);
    launch::check_hosts(flags.machine.hosts, ranks, num_hosts)?;
    // A plan that makes no sense is refused once, not by every rank.
    flags.machine.faults()?;
    let program =
        std::env::current_exe().map_err(|source| LaunchError::Os { doing: "find this program", source })?;
    let words = std::env::args_os().skip(1);
    let plan = Plan {
        ranks,
        hosts: flags.machine.hosts,
        num_hosts,
        command: [program.into_os_string()].into_iter().chain(words).collect(),
        output: Output::RankZero,
    };
    let ending = launch::launch(&plan)?;
    // A run that found something wrong has said so in rank 0's report, and no rank has anything to add.
    if let Ending::Failed(failure) = &ending
        && (failure.status.code() != Some(1) || failure.last_words.is_some())
    {
        eprintln!("ibex: {failure}");
    }
    Ok(Outcome::Ended(ending.exit_code()))
}

/// Runs one rank of the group that `place` names.
pub(super) fn run_rank(
    args: &Args,
    config: &ValidConfig,
    place: &Place,
    gpus: Gpus,
) -> Result<Outcome, CliError> {
    let is_first = place.rank == Rank(0);
    if is_first {
        claim_outputs(args)?;
    }
    let machine = &args.shared.machine;
    let faults = machine.faults()?;
    let options = MemberOptions {
        fabric: match machine.fabric() {
            FabricKind::Udp => MemberFabric::Udp,
            FabricKind::Inproc | FabricKind::Sim | FabricKind::Shm => MemberFabric::Shm,
        },
        doorbells: if args.shared.check { Doorbells::Strict } else { Doorbells::Record },
        advertise_flag: machine.advertise.clone(),
        faults: faults.clone(),
        capture: args.pcap.as_deref().map(|path| of_rank(path, place.rank)),
        timeout: PATIENCE,
        gpus,
        ..MemberOptions::default()
    };
    let member = Member::join(config, place, &options)?;
    let run = Run::new(args, member)?;
    if is_first {
        run.print_ways();
    }
    let mut samples = run.run()?;
    let totals = run.end(&mut samples.verdict)?;
    let report = Report::new(&args.shared, config, faults, &samples, &totals);
    let outcome = if is_first { tell(args, &report, &samples)? } else { report.outcome() };
    let captured = run.member.flush_capture()?;
    if let (true, Some(packets)) = (is_first, captured) {
        eprintln!("ibex: rank 0 captured {packets} packets");
    }
    run.leave()?;
    Ok(outcome)
}

/// The file of one rank: `run.pcapng` becomes `run.3.pcapng`.
fn of_rank(path: &Path, rank: Rank) -> PathBuf {
    let extension = path.extension().map_or_else(OsString::new, OsStr::to_os_string);
    let mut name = OsString::from(format!("{rank}."));
    name.push(if extension.is_empty() { OsStr::new("pcapng") } else { &extension });
    path.with_extension(name)
}

/// What a rank tells the others at the end.
#[derive(Serialize, Deserialize)]
struct RankEnd {
    totals: Totals,
    wrong: u64,
    lost: u64,
    checked: u64,
}

/// One rank of the group.
struct Run<'a> {
    args: &'a Args,
    bench: RankBench<'a>,
    rank: RigRank,
    // Last: tensors and session go before the device.
    member: Member,
}

impl<'a> Run<'a> {
    fn new(args: &'a Args, member: Member) -> Result<Self, Error> {
        let session = member.session();
        let rank = RigRank {
            tensors: session.tensors()?,
            stream: session.stream(),
            session: std::sync::Arc::clone(session),
        };
        let bench = RankBench::new(&args.shared, &rank)?;
        Ok(Self { args, bench, rank, member })
    }

    fn flags(&self) -> &'a Shared {
        &self.args.shared
    }

    fn me(&self) -> Rank {
        self.rank.rank()
    }

    fn config(&self) -> &ValidConfig {
        self.rank.session.config()
    }

    fn barrier(&self, key: &str) -> Result<(), Error> {
        Ok(self.member.bootstrap().barrier(key, PATIENCE)?)
    }

    /// Which address was chosen, and how the first rank reaches the others.
    fn print_ways(&self) {
        if let Some(advertised) = self.member.advertised() {
            eprintln!("ibex: rank 0 advertises {advertised}{}", self.other_port(advertised.address));
        }
        let mut ways: Vec<(RouteReport, RankList)> = Vec::new();
        // CAST: at most 512 ranks.
        for peer in (0..self.config().num_ranks as u16).map(Rank) {
            let way = self.rank.session.route(peer);
            // Reasons of one kind differ in details only, such as which other host it is.
            let is_like = |other: &RouteReport| {
                way.route == other.route && discriminant(&way.reason) == discriminant(&other.reason)
            };
            match ways.iter_mut().find(|(other, _)| is_like(other)) {
                Some((_, peers)) => peers.0.push(peer),
                None => ways.push((way, RankList(vec![peer]))),
            }
        }
        for (way, peers) in ways {
            eprintln!("ibex: rank 0 reaches {peers} by {way}");
        }
    }

    /// Says which port this rank's socket has, if it is not the usual one.
    fn other_port(&self, address: IpAddr) -> String {
        let usual = UdpConfig::new(address).bind.port();
        match self.member.fabric().socket() {
            Some((local, _)) if local.port() != usual => {
                format!(", port {}: another socket has {usual}", local.port())
            }
            _ => String::new(),
        }
    }

    fn run(&self) -> Result<Samples, CliError> {
        let flags = self.flags();
        let mut samples = Samples::default();
        let total = flags.warmup + flags.iters;
        let is_first = self.me() == Rank(0);
        let mut progress = is_first.then(|| Progress::new("step", total));
        // What one device copies is no measure of several that do.
        let mut yardsticks = (is_first && !flags.machine.is_cuda()).then(Yardsticks::host);
        for iteration in 0..total {
            let inputs = self.inputs(iteration, is_first);
            let times = self.step(iteration, &inputs, &mut samples.verdict)?;
            if iteration >= flags.warmup {
                let [dispatch_us, combine_us] = times;
                samples.dispatch_us.push(dispatch_us);
                samples.combine_us.push(combine_us);
                self.barrier("bench/quiet")?;
                if let Some(yardsticks) = &mut yardsticks {
                    yardsticks.measure(&Moved::new(self.config(), &inputs), &mut samples.measured)?;
                }
                self.barrier("bench/floor")?;
            }
            if let Some(progress) = &mut progress {
                progress.step(iteration + 1);
            }
        }
        Ok(samples)
    }

    /// Everybody's inputs where they are needed: to check against, and to know what a step moves. Else only our own
    /// stands there.
    fn inputs(&self, iteration: u32, needs_all: bool) -> Vec<RankInput> {
        let (flags, config) = (self.flags(), self.config());
        if flags.check || needs_all {
            return all_inputs(flags, config, iteration);
        }
        let mut inputs = vec![RankInput::default(); config.num_ranks as usize];
        inputs[self.me().index()] = input(flags, config, iteration, self.me());
        inputs
    }

    /// One step; the times of the slowest rank.
    fn step(&self, iteration: u32, inputs: &[RankInput], verdict: &mut Verdict) -> Result<[f64; 2], Error> {
        let (rank, bench, flags) = (&self.rank, &self.bench, self.flags());
        let lane = Lane(iteration % flags.shape.lanes);
        let input = &inputs[self.me().index()];
        let synchronize = || rank.session.gpu().synchronize(&rank.stream);
        bench.load(rank, input)?;
        self.barrier("bench/dispatch")?;
        let handle = bench.start_dispatch(rank, lane)?;
        synchronize()?;
        let dispatch_us = bench.elapsed_us(rank)?;
        rank.session.run_expert(&rank.stream, &rank.tensors)?;
        synchronize()?;
        self.barrier("bench/combine")?;
        bench.start_combine(rank, lane, handle.as_ref())?;
        synchronize()?;
        let combine_us = bench.elapsed_us(rank)?;
        let times = self.slowest([dispatch_us, combine_us])?;
        if self.args.corrupt && self.me() == Rank(0) {
            flip_bit(rank)?;
        }
        if flags.check {
            let step = Step::new(self.config(), inputs);
            *verdict += check(rank, &step, input, &vec![true; inputs.len()])?;
        } else {
            verdict.lost += count_losses(rank, input)?;
        }
        Ok(times)
    }

    /// The largest of each number over all ranks.
    fn slowest(&self, mine: [f64; 2]) -> Result<[f64; 2], Error> {
        let blob: Vec<u8> = mine.iter().flat_map(|us| us.to_le_bytes()).collect();
        let mut slowest = mine;
        let key = "bench/times";
        for (from, blob) in (0..).map(Rank).zip(self.member.bootstrap().all_gather(key, &blob, PATIENCE)?) {
            let (numbers, rest) = blob.as_chunks::<8>();
            if numbers.len() != slowest.len() || !rest.is_empty() {
                return Err(BootstrapError::Blob { from, what: "times" }.into());
            }
            for (slowest, number) in slowest.iter_mut().zip(numbers) {
                *slowest = slowest.max(f64::from_le_bytes(*number));
            }
        }
        Ok(slowest)
    }

    /// Lets the device look for WQEs that no doorbell covers, once nobody posts any more; then adds up what all ranks
    /// found.
    fn end(&self, verdict: &mut Verdict) -> Result<Totals, Error> {
        self.barrier("bench/end")?;
        self.member.set_silent(true);
        // A sign of life that was being sent when the rank fell silent is out by then.
        sleep(QUIET);
        self.member.device().check_unrung();
        let fault_counts = self.member.fabric().fault_counts();
        let totals = Totals { fault_counts, ..Totals::of(&self.rank, Some(self.member.device()))? };
        let Verdict { wrong, lost, checked, .. } = *verdict;
        let mine = RankEnd { totals, wrong, lost, checked };
        // PANIC: numbers always serialise.
        let blob = serde_json::to_vec(&mine).expect("numbers are plain data");
        let mut all = Totals::default();
        *verdict = Verdict::default();
        let key = "bench/totals";
        for (from, blob) in (0..).map(Rank).zip(self.member.bootstrap().all_gather(key, &blob, PATIENCE)?) {
            let end: RankEnd =
                serde_json::from_slice(&blob).map_err(|_| BootstrapError::Blob { from, what: "totals" })?;
            all += end.totals;
            *verdict +=
                Verdict { wrong: end.wrong, lost: end.lost, checked: end.checked, ..Verdict::default() };
        }
        Ok(all)
    }

    fn leave(self) -> Result<(), Error> {
        let Self { rank, bench, member, .. } = self;
        drop((bench, rank));
        member.leave()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_a_capture_of_its_own() {
        let file = |path: &str| of_rank(Path::new(path), Rank(3)).to_string_lossy().into_owned();
        assert_eq!(file("dir/run.pcapng"), "dir/run.3.pcapng");
        assert_eq!(file("run"), "run.3.pcapng");
    }
}
