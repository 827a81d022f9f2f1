//! What `ibex bench ep` tells: the JSON report, the table, the figure.
//!
//! Owns the numbers of one run. Keys of the JSON report are part of the interface.

use ibex::config::{RoutePolicy, ValidConfig};
use ibex::reference::check::Verdict;
use ibex_hca::emulated::switch::{FaultCounts, FaultPlan};
use serde::{Deserialize, Serialize};

use super::commit::commit;
use super::rank::{PacketTotals, Totals};
use super::stats::{Percentiles, median};
use super::yardstick::{BaselineName, COPY_RATIO_MIN, Measured};
use crate::cli::Outcome;
use crate::cli::flags::{ConfigReport, Shared};
use crate::cli::plot::{self, Series};
use crate::cli::table::{self, Table};

/// What a run measured.
#[derive(Default)]
pub(super) struct Samples {
    pub(super) dispatch_us: Vec<f64>,
    pub(super) combine_us: Vec<f64>,
    pub(super) measured: Measured,
    pub(super) verdict: Verdict,
}

/// The machine-readable report; keys are part of the interface.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) config: ConfigReport,
    pub(super) provider: &'static str,
    pub(super) gpu: &'static str,
    pub(super) fabric: &'static str,
    pub(super) commit: Option<String>,
    pub(super) seed: u64,
    pub(super) dispatch_us: Option<Percentiles>,
    pub(super) combine_us: Option<Percentiles>,
    pub(super) wrong: u64,
    pub(super) lost: u64,
    pub(super) bytes: RouteBytes,
    pub(super) buffer_bytes: u64,
    pub(super) tensor_bytes: u64,
    /// Counters of emulated devices; absent where devices are real.
    pub(super) wqes: Option<u64>,
    pub(super) doorbells: Option<u64>,
    pub(super) cqes: Option<u64>,
    pub(super) unrung_wqes: Option<u64>,
    pub(super) packets: PacketTotals,
    /// What a plan's faults did to packets; absent where no plan was given.
    pub(super) fault_counts: Option<FaultCounts>,
    pub(super) memcpy_floor_us: Pair,
    pub(super) floor_ratio: Pair,
    /// What copies of the same bytes took, where the kernels ran; how they were made; their part of the kernels' time;
    /// the least that it should be, where there is a limit.
    pub(super) copy_us: Pair,
    pub(super) copy_bytes: Pair,
    pub(super) copy_method: Option<&'static str>,
    pub(super) copy_ratio: Pair,
    pub(super) copy_ratio_min: Option<f64>,
    /// What `--baseline` took for the same bytes; absent where there was none.
    pub(super) baseline: Option<BaselineName>,
    pub(super) baseline_us: Pair,
}

impl Report {
    /// Puts together what all ranks measured, moved and hold.
    pub(super) fn new(
        flags: &Shared,
        config: &ValidConfig,
        faults: Option<FaultPlan>,
        samples: &Samples,
        totals: &Totals,
    ) -> Self {
        let measured = &samples.measured;
        let (floor, copy) = (measured.floor_us.medians(), measured.copy_us.medians());
        let took = Pair { dispatch: median(&samples.dispatch_us), combine: median(&samples.combine_us) };
        // Of medians; a step that moves nothing has none.
        let moves = flags.shape.tokens != 0;
        let share = |part: Option<f64>, whole: Option<f64>| {
            let whole = whole.filter(|whole| *whole > 0.0 && moves)?;
            Some(part? / whole)
        };
        let is_mapped = flags.machine.is_cuda() && flags.route == RoutePolicy::Auto;
        Self {
            config: ConfigReport::new(flags, config, faults),
            provider: flags.machine.provider_name(),
            gpu: flags.machine.gpu_name(),
            fabric: flags.machine.fabric_name(),
            commit: commit(),
            seed: flags.seed,
            dispatch_us: Percentiles::of(&samples.dispatch_us),
            combine_us: Percentiles::of(&samples.combine_us),
            wrong: samples.verdict.wrong,
            lost: samples.verdict.lost,
            bytes: totals.bytes,
            buffer_bytes: totals.buffer_bytes,
            tensor_bytes: totals.tensor_bytes,
            wqes: totals.seen.map(|seen| seen.wqes),
            doorbells: totals.seen.map(|seen| seen.doorbells),
            cqes: totals.seen.map(|seen| seen.cqes),
            unrung_wqes: totals.seen.map(|seen| seen.unrung_wqes),
            packets: totals.packets,
            fault_counts: totals.fault_counts,
            memcpy_floor_us: floor,
            floor_ratio: Pair {
                dispatch: share(took.dispatch, floor.dispatch),
                combine: share(took.combine, floor.combine),
            },
            copy_us: copy,
            copy_bytes: measured.copy_bytes.medians(),
            copy_method: measured.copy_method,
            copy_ratio: Pair {
                dispatch: share(copy.dispatch, took.dispatch),
                combine: share(copy.combine, took.combine),
            },
            copy_ratio_min: is_mapped.then_some(COPY_RATIO_MIN),
            baseline: measured.baseline.clone(),
            baseline_us: measured.baseline_us.medians(),
        }
    }

    /// Whether the run found nothing wrong.
    pub(super) fn outcome(&self) -> Outcome {
        if self.wrong + self.lost + self.unrung_wqes.unwrap_or(0) == 0 {
            Outcome::Good
        } else {
            Outcome::Wrong
        }
    }
}

/// Payload bytes by route, over the whole run.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct RouteBytes {
    pub(super) local: u64,
    pub(super) peer: u64,
    pub(super) rdma: u64,
}

/// One number per operation; absent where it has no meaning.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Pair {
    pub(super) dispatch: Option<f64>,
    pub(super) combine: Option<f64>,
}

/// Prints the table; `checked` counts rows and outputs that were verified.
pub(super) fn print(report: &Report, checked: u64) {
    let mut times = Table::new(&["us, slowest rank", "p50", "p90", "p99", "p99.9", "memcpy floor", "ratio"]);
    let operations = [
        ("dispatch", report.dispatch_us, report.memcpy_floor_us.dispatch, report.floor_ratio.dispatch),
        ("combine", report.combine_us, report.memcpy_floor_us.combine, report.floor_ratio.combine),
    ];
    for (name, percentiles, floor, ratio) in operations {
        let Some(p) = percentiles else { continue };
        let shown = |value: Option<f64>, digits| value.map_or("-".into(), |v| format!("{v:.digits$}"));
        times.row(
            [name.to_string()]
                .into_iter()
                .chain([p.p50, p.p90, p.p99, p.p999].map(|us| format!("{us:.0}")))
                .chain([shown(floor, 0), shown(ratio, 2)]),
        );
    }
    print!("{times}");
    print_yardsticks(report);
    let bytes = report.bytes;
    println!(
        "moved     local {}, peer {}, rdma {}",
        table::bytes(bytes.local),
        table::bytes(bytes.peer),
        table::bytes(bytes.rdma)
    );
    match (report.wqes, report.doorbells, report.cqes, report.unrung_wqes) {
        (Some(wqes), Some(doorbells), Some(cqes), Some(unrung)) => {
            println!("device    {wqes} wqes, {doorbells} doorbells, {cqes} cqes, {unrung} unrung wqes");
        }
        _ => println!("device    real ones do not count for us"),
    }
    print_packets(report);
    println!(
        "memory    {} of buffers, {} of tensors, per rank",
        table::bytes(report.buffer_bytes),
        table::bytes(report.tensor_bytes)
    );
    match checked {
        0 => println!("result    not checked, {} picks lost", report.lost),
        checked => println!(
            "result    {checked} rows and outputs checked: {} wrong, {} picks lost",
            report.wrong, report.lost
        ),
    }
}

/// Prints what the same bytes take without Ibex.
fn print_yardsticks(report: &Report) {
    let (us, sizes, ratios) = (report.copy_us, report.copy_bytes, report.copy_ratio);
    let rows = [
        ("dispatch", us.dispatch, sizes.dispatch, ratios.dispatch),
        ("combine", us.combine, sizes.combine, ratios.combine),
    ];
    for (name, us, size, ratio) in rows {
        let (Some(us), Some(size), Some(ratio), Some(method)) = (us, size, ratio, report.copy_method) else {
            continue;
        };
        let limit = report.copy_ratio_min.map_or(String::new(), |min| format!(", limit {min:.2}"));
        // CAST: a whole number of bytes, far below 2^53.
        let size = table::bytes(size as u64);
        println!("copy      {name} {ratio:.2} of the kernels' time{limit}: {us:.1} us for {size} ({method})");
    }
    if let (Some(baseline), Some(dispatch), Some(combine)) =
        (&report.baseline, report.baseline_us.dispatch, report.baseline_us.combine)
    {
        let BaselineName { name, version, method } = baseline;
        println!("{name:<9} dispatch {dispatch:.1} us, combine {combine:.1} us ({version}, {method})");
    }
}

/// Prints what became of packets, where there were any.
fn print_packets(report: &Report) {
    let packets = report.packets;
    if packets.sent > 0 {
        println!("packets   {} sent, {} of them again", packets.sent, packets.sent_again);
    }
    if let Some(faults) = report.fault_counts {
        let said = [
            (faults.dropped, "dropped"),
            (faults.duplicated, "duplicated"),
            (faults.delayed, "delayed"),
            (faults.reordered, "reordered"),
            (faults.corrupted, "corrupted"),
            (faults.paced, "paced"),
            (faults.overflowed + faults.crowded_out, "overflowed"),
            (faults.partitioned, "partitioned"),
            (faults.flapped, "flapped"),
        ];
        let said: Vec<_> =
            said.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        println!(
            "faults    {}",
            if said.is_empty() { String::from("none happened") } else { said.join(", ") }
        );
    }
}

/// Draws the latency histogram.
pub(super) fn draw(flags: &Shared, dispatch_us: &[f64], combine_us: &[f64]) -> String {
    let title = format!("Dispatch and combine, EP{}", flags.ranks());
    let s = &flags.shape;
    let shape = format!(
        "{} tokens per rank, hidden {}, top-{} of {} experts, {} dispatch, {} combine, {} routing",
        s.tokens, s.hidden, s.topk, s.experts, s.dtype, s.combine, flags.routing
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
        Series { name: "dispatch", samples_us: dispatch_us },
        Series { name: "combine", samples_us: combine_us },
    ];
    plot::histogram(&title, [&shape, &machine], &series)
}
