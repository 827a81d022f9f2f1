//! The command line: parse, refuse what cannot be done, run, report, exit.
//!
//! Owns the terminal and the report files. Exit codes: 0 good; 1 the run found something wrong, or could
//! not be carried out; 2 the request was refused, with one line that says what would have been right.
//!
//! INVARIANT: a flag is honoured or refused, never ignored.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ibex::bootstrap::BootstrapError;
use ibex::error::{ConfigError, Error};
use ibex::gpu::GpuError;

mod bench;
mod chaos;
mod doctor;
mod flags;
mod info;
mod launch;
mod nearest;
mod plot;
mod progress;
mod provider;
mod store;
mod table;

/// GPU-initiated expert-parallel communication, and the device to test it on.
#[derive(Parser)]
#[command(name = "ibex", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure, and with --check verify.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Kill, stop, cut off and mislead members of a group, and check everything that they compute.
    Chaos(chaos::Args),
    /// One rank of a campaign, as `chaos` starts it.
    #[command(name = "chaos-rank", hide = true)]
    ChaosRank,
    /// One rank that `bench detect` ends.
    #[command(name = "detect-rank", hide = true)]
    DetectRank(bench::DetectRank),
    /// Start ranks as processes, here or in network namespaces.
    Launch(launch::Args),
    /// Serve records to other processes, or look into a store.
    #[command(subcommand)]
    Store(store::Command),
    /// Look at this machine: what it has, what it lacks, what that costs, what mends it.
    Doctor(doctor::Args),
    /// Show what this build and this machine offer, and what a configuration costs in memory.
    Info(info::Args),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Good,
    /// The run was carried out and found wrong rows, losses or violations.
    Wrong,
    /// Processes were run, or a machine was looked at, and this code says how that ended.
    Ended(u8),
}

/// Why a command gave no result.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// A flag's value exists in the interface but not in this build.
    #[error("{flag} {value} is not built yet: this version has {available}")]
    NotBuilt { flag: &'static str, value: &'static str, available: &'static str },
    /// Two flags that exclude each other.
    #[error("{one} cannot be combined with {other}: {because}")]
    Conflict { one: &'static str, other: &'static str, because: &'static str },
    /// A report file that cannot be written; found out before the run.
    #[error("cannot write {}: {source}", .path.display())]
    Output { path: PathBuf, source: std::io::Error },
    /// A file that cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Input { path: PathBuf, source: std::io::Error },
    /// A fault plan that makes no sense.
    #[error("{}: {source}", .path.display())]
    Plan { path: PathBuf, source: Box<ibex_hca::emulated::switch::PlanError> },
    /// Text in which nothing is known.
    #[error("that is not understood: give {expected}")]
    Unclear { expected: &'static str },
    /// What a launcher says makes no sense.
    #[error(transparent)]
    Place(BootstrapError),
    /// Processes could not be started.
    #[error(transparent)]
    Launch(#[from] launch::LaunchError),
    /// No real device can be used.
    #[error(transparent)]
    Device(#[from] ibex_hca::mlx5::OpenError),
    /// No GPU can be used.
    #[error(transparent)]
    Cuda(#[from] ibex::gpu::cuda::CudaError),
    /// NCCL cannot be used.
    #[error(transparent)]
    Nccl(#[from] ibex::bootstrap::ibex_nccl::NcclError),
    /// What a run is compared with failed.
    #[error(transparent)]
    Baseline(#[from] ibex::harness::BaselineError),
    /// A store cannot be served.
    #[error(transparent)]
    Serve(ibex_metadata::grpc::HostError),
    /// The runtime refused or failed.
    #[error(transparent)]
    Runtime(#[from] Error),
}

impl From<ibex_metadata::error::StoreError> for CliError {
    fn from(error: ibex_metadata::error::StoreError) -> Self {
        Self::Runtime(error.into())
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        Self::Runtime(Error::Config(error))
    }
}

impl From<GpuError> for CliError {
    fn from(error: GpuError) -> Self {
        Self::Runtime(error.into())
    }
}

impl CliError {
    /// 2 where the request was refused before anything ran, 1 where it failed.
    fn exit_code(&self) -> u8 {
        match self {
            Self::NotBuilt { .. } | Self::Conflict { .. } | Self::Output { .. } | Self::Launch(_) => 2,
            Self::Device(_)
            | Self::Cuda(_)
            | Self::Nccl(_)
            | Self::Input { .. }
            | Self::Plan { .. }
            | Self::Place(_)
            | Self::Unclear { .. } => 2,
            Self::Runtime(Error::Config(_) | Error::Gpu(GpuError::UnorderedWrites { .. })) => 2,
            Self::Runtime(Error::Store(error)) => store::exit_code(error),
            Self::Serve(error) => store::serve_exit_code(error),
            Self::Runtime(_) | Self::Baseline(_) => 1,
        }
    }
}

/// Runs the command that `args` spell and returns the exit code.
pub(crate) fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            eprintln!("{}", one_line(&error));
            return ExitCode::from(2);
        }
        Err(help) => {
            // Help that cannot be printed has nobody to complain to.
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
    };
    let result = match cli.command {
        Command::Bench(command) => bench::run(command),
        Command::Chaos(args) => chaos::run(&args),
        Command::ChaosRank => chaos::run_rank(),
        Command::DetectRank(args) => bench::run_detect_rank(&args),
        Command::Launch(args) => launch::run(&args).map(Outcome::Ended),
        Command::Store(command) => store::run(&command),
        Command::Doctor(args) => doctor::run(&args),
        Command::Info(args) => info::run(&args),
    };
    match result {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Wrong) => ExitCode::from(1),
        Ok(Outcome::Ended(code)) => ExitCode::from(code),
        Err(error) => {
            eprintln!("ibex: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// The parser's complaint without its layout: scripts and people read one line.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim);
    let useful: Vec<&str> =
        lines.take_while(|line| !line.starts_with("Usage:")).filter(|line| !line.is_empty()).collect();
    let line = useful.join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    let line = line.strip_suffix("For more information, try '--help'.").unwrap_or(line);
    format!("ibex: {}", line.trim_end())
}

/// Creates or empties a report file now, so that a bad path is refused before a long run.
fn claim_output(path: Option<&Path>) -> Result<(), CliError> {
    let Some(path) = path else { return Ok(()) };
    write_output(path, "")
}

fn write_output(path: &Path, text: &str) -> Result<(), CliError> {
    std::fs::write(path, text).map_err(|source| CliError::Output { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn complaints_are_one_line_and_say_what_exists() {
        let complaint = |args: &[&str]| match Cli::try_parse_from(args) {
            Ok(_) => panic!("{args:?} was accepted"),
            Err(error) => one_line(&error),
        };
        let line = complaint(&["ibex", "bench", "ep", "--dtype", "fp4"]);
        assert!(!line.contains('\n') && line.contains("'fp4'") && line.contains("bf16, fp8"), "{line}");
        let line = complaint(&["ibex", "bench", "ep", "--tokens", "-1"]);
        assert!(!line.contains('\n') && line.contains("-1"), "{line}");
        let line = complaint(&["ibex", "launch"]);
        assert!(!line.contains('\n') && line.contains("--ranks"), "{line}");
    }

    #[test]
    fn refusals_exit_with_2_and_failures_with_1() {
        let not_built = CliError::NotBuilt { flag: "--gpu", value: "cuda", available: "host" };
        assert_eq!(not_built.exit_code(), 2);
        assert_eq!(not_built.to_string(), "--gpu cuda is not built yet: this version has host");
        let os = ibex::error::OsError { call: "mmap", errno: 12 };
        assert_eq!(CliError::from(Error::from(os)).exit_code(), 1);
    }
}
