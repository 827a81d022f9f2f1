//! `ibex bench post`: work requests posted by the shipped post kernel, against plain memcpy.
//!
//! A run owns one rig per row. Every WQE of every round is checked in memory, so there is no `--check`; a row's
//! rate is the median over its rounds. memcpy moves the same messages between the same number of slots on one
//! thread, because one thread runs the kernel and the device; rounds of both take turns. With `--gpu cuda` the kernel
//! runs on the GPU, between two of its events; rings, records and doorbell pages are mapped host memory, and one thread
//! of the host is the device that completes: so the rate is that of both together.

use std::path::PathBuf;
use std::sync::Arc;

use clap::builder::RangedU64ValueParser;
use ibex::error::Error;
use ibex::gpu::{CudaMemory, Gpu};
use ibex::harness::post::{Copies, INLINE_LEN, PostCase, PostRig};
use serde::Serialize;

use super::commit::commit;
use super::stats::median;
use crate::cli::flags::{FabricKind, Machine};
use crate::cli::progress::Progress;
use crate::cli::provider;
use crate::cli::table::{Table, count};
use crate::cli::{CliError, Outcome, claim_output, write_output};

/// Bytes that one round moves, at least; more than caches hold, and so long that waking the worker that runs the
/// kernel hardly counts.
const ROUND_BYTES: u64 = 64 << 20;
/// Messages of a round at most: small ones would take long to check.
const ROUND_WQES_MAX: u64 = 1 << 17;
/// Messages of a latency round.
const LATENCY_WQES: u32 = 2_000;
/// Payload lengths of the rows that are not inline: a cache line, a small row, the published fp8 and bf16 rows.
const LENGTHS: [u32; 4] = [64, 1024, 7168, 14_336];
/// Queue pairs of the rows.
const QUEUES: [u32; 2] = [1, 4];

/// What a rate is of.
const METHOD_HOST: &str = "one thread is kernel and device; its clock around the launch";
const METHOD_CUDA: &str = "kernel on the gpu, between CUDA events; rings, records and doorbells in mapped host memory; \
                           one host thread is the device";

/// Flags of `bench post`.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    machine: Machine,
    /// Rounds that are measured, per row.
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = rounds(1))]
    iters: u32,
    /// Rounds before them, per row.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = rounds(0))]
    warmup: u32,
    /// Seed of the payloads.
    #[arg(long, default_value_t = 1, value_name = "S")]
    seed: u64,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A number of rounds, at least `min`.
fn rounds(min: u64) -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(min..=100_000)
}

/// The machine-readable report; keys are part of the interface.
#[derive(Debug, Serialize)]
struct Report {
    provider: &'static str,
    gpu: &'static str,
    fabric: &'static str,
    commit: Option<String>,
    seed: u64,
    rows: Vec<Row>,
    wrong: u64,
    unrung_wqes: u64,
    /// What ran where, and whose clock was read.
    method: &'static str,
}

/// One message shape.
#[derive(Debug, Serialize)]
struct Row {
    bytes: u32,
    inline: bool,
    qps: u32,
    wqe_per_s: f64,
    bytes_per_s: f64,
    memcpy_bytes_per_s: f64,
    ratio: f64,
    latency_us: f64,
}

/// Runs the benchmark and reports.
pub(super) fn run(args: &Args) -> Result<Outcome, CliError> {
    args.machine.validate_one_process()?;
    if args.machine.fabric() == FabricKind::Sim {
        let because = "rates in virtual time mean nothing";
        return Err(CliError::Conflict { one: "--fabric sim", other: "bench post", because });
    }
    claim_output(args.json.as_deref())?;
    let gpus = provider::open_gpus(&args.machine, 1, CudaMemory::HostMapped)?;
    let gpu = gpus.shared.map(|gpu| gpu as Arc<dyn Gpu>);
    let shapes: Vec<(u32, bool, u32)> = QUEUES
        .into_iter()
        .flat_map(|qps| {
            let plain = LENGTHS.into_iter().map(move |bytes| (bytes, false, qps));
            [(INLINE_LEN, true, qps)].into_iter().chain(plain)
        })
        .collect();
    let mut report = Report {
        provider: args.machine.provider_name(),
        gpu: args.machine.gpu_name(),
        fabric: args.machine.fabric_name(),
        commit: commit(),
        seed: args.seed,
        rows: Vec::new(),
        wrong: 0,
        unrung_wqes: 0,
        method: if gpu.is_some() { METHOD_CUDA } else { METHOD_HOST },
    };
    // CAST: a dozen rows.
    let mut progress = Progress::new("row", shapes.len() as u32);
    for (done, (bytes, inline, qps)) in (1..).zip(shapes) {
        let row = measure(args, gpu.as_ref(), bytes, inline, qps, &mut report)?;
        report.rows.push(row);
        progress.step(done);
    }
    drop(progress);
    print(&report);
    if let Some(path) = &args.json {
        // PANIC: numbers, strings and named fields always serialise.
        let json = serde_json::to_string_pretty(&report).expect("a report is plain data");
        write_output(path, &format!("{json}\n"))?;
    }
    Ok(if report.wrong + report.unrung_wqes == 0 { Outcome::Good } else { Outcome::Wrong })
}

/// Measures one row; what is wrong adds up in the report.
fn measure(
    args: &Args,
    gpu: Option<&Arc<dyn Gpu>>,
    bytes: u32,
    inline: bool,
    qps: u32,
    report: &mut Report,
) -> Result<Row, Error> {
    let wqes = ROUND_BYTES.div_ceil(bytes.into()).min(ROUND_WQES_MAX);
    // CAST: bounded by ROUND_WQES_MAX.
    let slots = wqes.div_ceil(qps.into()) as u32;
    let case = PostCase { bytes, inline, num_qps: qps, slots, batch: 32, sq_depth_log: 10 };
    let mut rig = rig(args, gpu, case)?;
    let mut copies = Copies::new(&case);
    let (mut rates, mut copy_rates) = (Vec::new(), Vec::new());
    for round in 0..args.warmup + args.iters {
        let result = rig.round()?;
        report.wrong += result.wrong + (case.wqes() - result.completed.min(case.wqes()));
        let copy_ns = copies.round_ns();
        if round >= args.warmup {
            rates.push(case.wqes() as f64 * 1e9 / result.elapsed_ns.max(1) as f64);
            copy_rates.push((case.wqes() * u64::from(bytes)) as f64 * 1e9 / copy_ns.max(1) as f64);
        }
    }
    report.unrung_wqes += rig.unrung_wqes();
    drop(rig);
    let wqe_per_s = median(&rates).unwrap_or(0.0);
    let memcpy_bytes_per_s = median(&copy_rates).unwrap_or(0.0);
    let bytes_per_s = wqe_per_s * f64::from(bytes);
    Ok(Row {
        bytes,
        inline,
        qps,
        wqe_per_s,
        bytes_per_s,
        memcpy_bytes_per_s,
        ratio: bytes_per_s / memcpy_bytes_per_s.max(1.0),
        latency_us: latency_us(args, gpu, &case, report)?,
    })
}

fn rig(args: &Args, gpu: Option<&Arc<dyn Gpu>>, case: PostCase) -> Result<PostRig, Error> {
    match gpu {
        Some(gpu) => PostRig::with_gpu(Arc::clone(gpu), case, args.machine.link, args.seed),
        None => PostRig::new(case, args.machine.link, args.seed),
    }
}

/// From post to completion: a queue of one WQE cannot post the next before it has seen the last.
fn latency_us(
    args: &Args,
    gpu: Option<&Arc<dyn Gpu>>,
    case: &PostCase,
    report: &mut Report,
) -> Result<f64, Error> {
    let case = PostCase { num_qps: 1, slots: LATENCY_WQES, batch: 1, sq_depth_log: 0, ..*case };
    let mut rig = rig(args, gpu, case)?;
    let mut samples = Vec::new();
    for _ in 0..args.iters.min(10) {
        let round = rig.round()?;
        report.wrong += round.wrong;
        samples.push(round.elapsed_ns as f64 / f64::from(LATENCY_WQES) / 1e3);
    }
    Ok(median(&samples).unwrap_or(0.0))
}

fn print(report: &Report) {
    let header = ["bytes", "inline", "qps", "wqe/s", "bytes/s", "memcpy/s", "ratio", "latency us"];
    let mut table = Table::new(&header);
    for row in &report.rows {
        table.row([
            row.bytes.to_string(),
            if row.inline { "yes" } else { "no" }.to_string(),
            row.qps.to_string(),
            count(row.wqe_per_s),
            count(row.bytes_per_s),
            count(row.memcpy_bytes_per_s),
            format!("{:.2}", row.ratio),
            format!("{:.2}", row.latency_us),
        ]);
    }
    print!("{table}");
    println!("method  {}", report.method);
    println!("result  every WQE checked in memory: {} wrong, {} unrung", report.wrong, report.unrung_wqes);
}
