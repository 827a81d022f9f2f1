//! `ibex doctor`: what this machine has for Ibex, what it lacks, what each lack costs, and what mends it.
//!
//! Three parts that know little of each other: `probe` looks at the machine and describes it ([`machine::Machine`]),
//! `judge` turns any description into findings, `decode` explains refusals that a device gave. This file owns the
//! terminal and the report.
//!
//! Exit codes: 0 nothing worse than a note; 1 a warning; 2 the request was refused; 3 a blocker.

use std::path::PathBuf;

use ibex::gpu::image;
use ibex::ids::Rank;
use ibex::session::buffer_bytes;
use serde::Serialize;

use super::flags::Shape;
use super::{CliError, Outcome, claim_output, write_output};

mod decode;
mod judge;
mod machine;
mod probe;

use judge::{Diagnosis, Needs};
use machine::Machine;
pub(super) use machine::PciPath;
pub(super) use probe::Places;

/// Flags of `doctor`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Write the description, the findings and the verdict as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Judge a machine that was described before, by its --json file, instead of this one.
    #[arg(long, value_name = "FILE", conflicts_with = "explain")]
    machine: Option<PathBuf>,
    /// Explain a refusal or an error completion: a line of dmesg, of this program, or "cqe 0x13 0x88".
    #[arg(long, value_name = "TEXT", conflicts_with = "json")]
    explain: Option<String>,
    #[command(flatten)]
    shape: Shape,
}

/// What `--json` writes and `--machine` reads.
#[derive(Serialize)]
struct Report<'a> {
    machine: &'a Machine,
    severity: judge::Severity,
    #[serde(flatten)]
    diagnosis: &'a Diagnosis,
}

/// Looks, judges, prints.
pub(super) fn run(args: &Args) -> Result<Outcome, CliError> {
    if let Some(text) = &args.explain {
        println!("{}", decode::explain(text)?);
        return Ok(Outcome::Good);
    }
    claim_output(args.json.as_deref())?;
    let needs = needs(&args.shape)?;
    let machine = match &args.machine {
        Some(path) => read(path)?,
        None => probe::machine(),
    };
    let diagnosis = judge::judge(&machine, &needs);
    if let Some(path) = &args.json {
        let report = Report { machine: &machine, severity: diagnosis.worst(), diagnosis: &diagnosis };
        let text = serde_json::to_string_pretty(&report)
            .map_err(|source| CliError::Output { path: path.clone(), source: source.into() })?;
        write_output(path, &text)?;
    }
    print(&diagnosis);
    match diagnosis.worst().exit_code() {
        0 => Ok(Outcome::Good),
        code => Ok(Outcome::Ended(code)),
    }
}

/// What the shape of the flags, or the published one, wants of a machine.
fn needs(shape: &Shape) -> Result<Needs, CliError> {
    let config = shape.config()?.validate()?;
    let ranks = (0..config.num_ranks).map(|rank| {
        // CAST: at most 512 ranks.
        Rank(rank as u16)
    });
    Ok(Needs {
        buffer_bytes: ranks.map(|rank| buffer_bytes(&config, rank)).max().unwrap_or(0),
        attempt_ns: config.rc_timers().timeout_ns(),
        has_cuda_image: !image::bytes().is_empty(),
        has_cuda_backend: false,
        has_mlx5_provider: true,
    })
}

/// A description: a whole report, or the machine alone.
fn read(path: &PathBuf) -> Result<Machine, CliError> {
    let refused = |source: std::io::Error| CliError::Input { path: path.clone(), source };
    let text = std::fs::read_to_string(path).map_err(refused)?;
    let mut value: serde_json::Value = serde_json::from_str(&text).map_err(|error| refused(error.into()))?;
    if let Some(machine) = value.get_mut("machine") {
        value = machine.take();
    }
    serde_json::from_value(value).map_err(|error| refused(error.into()))
}

fn print(diagnosis: &Diagnosis) {
    let width = diagnosis.findings.iter().map(|finding| finding.area.len()).max().unwrap_or(0);
    for finding in &diagnosis.findings {
        println!("{:<8} {:<width$}  {}", finding.severity.name(), finding.area, finding.what);
        if let Some(costs) = finding.costs {
            println!("{:<8} {:<width$}    costs: {costs}", "", "");
        }
        if let Some(mend) = &finding.mend {
            println!("{:<8} {:<width$}    mend:  {mend}", "", "");
        }
    }
    println!();
    for sentence in &diagnosis.verdict {
        println!("{sentence}");
    }
}
