//! The benchmarks: `ep` (dispatch and combine, end to end), `post` (work requests alone), `store` (records), `rejoin`
//! (a replaced rank), `detect` (a lost one).
//!
//! Owns the samples of a run and its reports. Every number of a report comes from one run: what is
//! compared was measured in the same process, between the same steps.

use clap::Subcommand;

use super::{CliError, Outcome};

mod commit;
mod detect;
mod ep;
mod floor;
mod moved;
mod pcap;
mod post;
mod procs;
mod rank;
mod rejoin;
mod report;
pub(super) mod stats;
mod store;
mod yardstick;

pub(super) use detect::{RankArgs as DetectRank, run_rank as run_detect_rank};

/// The benchmarks.
#[derive(Subcommand)]
pub(super) enum Command {
    /// Dispatch and combine, end to end.
    Ep(Box<ep::Args>),
    /// Work requests posted by the post kernel, against memcpy.
    Post(post::Args),
    /// Reading, publishing and noticing records, against the least that it could cost.
    Store(store::Args),
    /// A rank replaced in place, against recreating all queue pairs.
    Rejoin(rejoin::Args),
    /// How long a group takes to notice that a rank is gone, by each kind of evidence.
    Detect(detect::Args),
}

/// Runs a benchmark.
pub(super) fn run(command: Command) -> Result<Outcome, CliError> {
    match command {
        Command::Ep(args) => ep::run(*args),
        Command::Post(args) => post::run(&args),
        Command::Store(args) => store::run(&args),
        Command::Rejoin(args) => rejoin::run(&args),
        Command::Detect(args) => detect::run(&args),
    }
}
