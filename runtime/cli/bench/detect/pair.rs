//! Two ranks of one group over a store: one of this process, and one that is a process, which ends.
//!
//! A [`Pair`] owns its member and its child. The child dies with it, and with the thread that started it.

use core::time::Duration;
use std::io::{self, Read};
use std::process::{Child, Command, Stdio};

use ibex::config::{Config, RoutePolicy};
use ibex::error::{Error, Evidence, OsError};
use ibex::ids::Rank;
use ibex::membership::RankSet;
use ibex::session::{ElasticMember, ElasticOptions, GroupName, Happening, MemberFabric, MemberOptions};
use ibex::time::{Deadline, Stopwatch, sleep};
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::url::StoreUrl;
use rustix::process::{Pid, Signal, kill_process};

use super::STORE_BUDGET;
use crate::cli::launch::{LaunchError, tie};
use crate::cli::{CliError, Outcome};

/// The rank that ends.
const LOST: Rank = Rank(1);
/// Nobody waits longer for anything; far more than a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks at the survivor's slots.
const LOOK: Duration = Duration::from_micros(50);

/// What becomes of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// SIGKILL.
    Killed,
    /// SIGSTOP: it lives, and says nothing any more.
    Stopped,
}

impl End {
    const fn signal(self) -> Signal {
        match self {
            Self::Killed => Signal::KILL,
            Self::Stopped => Signal::STOP,
        }
    }

    const fn explains(self, evidence: Evidence) -> bool {
        match self {
            Self::Killed => matches!(evidence, Evidence::Exit),
            Self::Stopped => matches!(evidence, Evidence::Lease),
        }
    }
}

/// A group that computes nothing; both ends of it are made from this.
pub(super) fn config(detect_ms: u32) -> Config {
    Config {
        num_ranks: 2,
        max_tokens: 4,
        hidden: 256,
        num_experts: 2,
        max_topk: 1,
        num_sms: 1,
        warps_per_block: 2,
        route: RoutePolicy::Ibgda,
        detect_ms,
        ..Config::default()
    }
}

fn join(store: &Blocking, group: &str, rank: Rank, detect_ms: u32) -> Result<ElasticMember, Error> {
    let options = ElasticOptions {
        group: GroupName { cluster: "detect".into(), group: group.into() },
        rank,
        initial: RankSet::first(2),
        takeover: false,
        flap_window: None,
        node: MemberOptions { fabric: MemberFabric::Shm, ..MemberOptions::default() },
    };
    let member = ElasticMember::join(&config(detect_ms), store, &options)?;
    member.ready(0);
    Ok(member)
}

/// Two ranks that are members. See the module documentation.
pub(super) struct Pair {
    member: ElasticMember,
    child: Ends,
}

/// A child that is killed when this is dropped.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        // One that has ended is not hurt by it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Pair {
    /// A group in which both are members.
    pub(super) fn meet(store: &Blocking, url: &str, group: &str, detect_ms: u32) -> Result<Self, CliError> {
        let child = Ends(start(url, group, detect_ms)?);
        let member = join(store, group, Rank(0), detect_ms)?;
        member.wait_open(PATIENCE)?;
        Ok(Self { member, child })
    }

    /// How long the member takes to mask the other one; none if it does not, or for another reason.
    pub(super) fn lose(self, end: End) -> Result<Option<Duration>, CliError> {
        let session = self.member.session();
        if !session.is_active(LOST) {
            return Ok(None);
        }
        let deadline = Deadline::after(PATIENCE);
        let watch = Stopwatch::start();
        // A process that has ended and was not waited for keeps its number.
        kill_process(Pid::from_child(&self.child.0), end.signal())
            .map_err(|errno| Error::from(OsError { call: "kill", errno: errno.raw_os_error() }))?;
        while session.is_active(LOST) && !deadline.has_passed() {
            sleep(LOOK);
        }
        let took = watch.elapsed();
        let is_explained = self.member.take_events().into_iter().any(|event| match event.what {
            Happening::Suspected { peer, evidence, .. } => peer == LOST && end.explains(evidence),
            _ => false,
        });
        Ok(is_explained.then_some(took))
    }
}

fn start(url: &str, group: &str, detect_ms: u32) -> Result<Child, LaunchError> {
    let os = |doing| move |source| LaunchError::Os { doing, source };
    let mut command = Command::new(std::env::current_exe().map_err(os("find this program"))?);
    command.args(["detect-rank", "--store", url, "--group", group, "--detect-ms", &detect_ms.to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    tie(&mut command, None);
    command.spawn().map_err(os("start a rank"))
}

/// Flags of `detect-rank`, as this file gives them.
#[derive(clap::Args)]
pub(in crate::cli) struct RankArgs {
    /// Where the group keeps its records.
    #[arg(long)]
    store: String,
    /// Its name.
    #[arg(long)]
    group: String,
    /// How long a peer may be silent.
    #[arg(long)]
    detect_ms: u32,
}

/// One rank, which does nothing until its input ends, or it.
pub(in crate::cli) fn run_rank(args: &RankArgs) -> Result<Outcome, CliError> {
    let store = Blocking::open(&StoreUrl::parse(&args.store)?, Clock::system(), STORE_BUDGET)?;
    let _member = join(&store, &args.group, LOST, args.detect_ms)?;
    // What comes in means nothing; that nothing more comes means that the bench is over.
    let _ = io::stdin().read_to_end(&mut Vec::new());
    Ok(Outcome::Good)
}
