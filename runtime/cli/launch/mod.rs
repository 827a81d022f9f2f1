//! `ibex launch`: ranks as processes, on this host or one host per network namespace.
//!
//! A [`Group`] owns its ranks' processes, the threads that read their output, and the namespaces. Whatever ends it,
//! nothing stays: ranks are told to end and then killed, with everything they started; a rank whose launcher dies is
//! killed by the kernel; namespaces have no name and vanish with the last process in them.
//!
//! ```text
//!  launcher --- RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, IBEX_TOKEN, .. ---> rank 0, rank 1, ..
//!     ^  \--- SIGINT, SIGTERM, SIGHUP as they come ---------------------------> process group of each
//!     +------ lines of output, "[rank 3] " before each -------------------------------/
//! ```
//!
//! INVARIANT: the exit code is that of the rank that failed first; 128 + n for a rank that signal n killed, and 0 only
//! if every rank ended with 0.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::process::ExitStatus;

use super::CliError;
use super::flags::Hosts;

mod log;
mod namespaces;
mod spawn;
mod watch;

pub(super) use namespaces::Namespaces;
pub(super) use spawn::{random_token, tie};

/// Most hosts that `--hosts netns` makes.
pub(super) const HOSTS_MAX: u32 = 64;

/// Flags of `launch`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Ranks to start.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=512))]
    ranks: u32,
    /// Where they run: here, or in network namespaces joined by a bridge.
    #[arg(long, default_value = "local")]
    hosts: Hosts,
    /// Network namespaces, each with an equal share of the ranks [default: one per rank].
    #[arg(long, value_name = "H", value_parser = clap::value_parser!(u32).range(1..=i64::from(HOSTS_MAX)))]
    num_hosts: Option<u32>,
    /// The command that every rank runs.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Whose output comes through unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// Every line of every rank has its rank before it.
    Prefixed,
    /// Rank 0 speaks for the group: it has the launcher's own output.
    RankZero,
}

/// What to start.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Ranks.
    pub(super) ranks: u32,
    /// Where they run.
    pub(super) hosts: Hosts,
    /// Network namespaces.
    pub(super) num_hosts: u32,
    /// What every rank runs.
    pub(super) command: Vec<OsString>,
    /// Who is heard.
    pub(super) output: Output,
}

/// Why a group could not be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum LaunchError {
    /// A tool that is not installed, or that failed.
    #[error("cannot {doing}: `{tool}` {said}")]
    Tool { tool: &'static str, doing: &'static str, said: String },
    /// The system refuses namespaces to this user.
    #[error("--hosts netns needs the right to make network namespaces (root, or CAP_SYS_ADMIN): {source}")]
    Namespace { source: io::Error },
    /// The command cannot be run.
    #[error("cannot start {}: {source}", .command.display())]
    Spawn { command: OsString, source: io::Error },
    /// Something that every launch needs.
    #[error("cannot {doing}: {source}")]
    Os { doing: &'static str, source: io::Error },
}

/// How a group ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Every rank ended with 0.
    Good,
    /// A rank failed before all others.
    Failed(Failure),
    /// A signal told the launcher to end, and it told the ranks.
    Interrupted { signal: i32 },
}

/// The first failure of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) rank: u32,
    pub(super) status: ExitStatus,
    /// The last line that it wrote to standard error, where the launcher read it.
    pub(super) last_words: Option<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} failed first ({})", self.rank, self.status)?;
        self.last_words.iter().try_for_each(|words| write!(f, ": {words}"))
    }
}

impl Ending {
    /// The exit code of the launcher.
    pub(super) fn exit_code(&self) -> u8 {
        use std::os::unix::process::ExitStatusExt;
        // CAST: exit codes and signals are below 256; wrapping would only happen above.
        let by_signal = |signal: i32| (128 + signal) as u8;
        match self {
            Self::Good => 0,
            Self::Interrupted { signal } => by_signal(*signal),
            Self::Failed(failure) => match (failure.status.code(), failure.status.signal()) {
                (Some(code), _) => code as u8,
                (None, Some(signal)) => by_signal(signal),
                (None, None) => 1,
            },
        }
    }
}

/// Runs `ibex launch`.
pub(super) fn run(args: &Args) -> Result<u8, CliError> {
    let num_hosts = args.num_hosts.unwrap_or(args.ranks);
    if args.hosts == Hosts::Local && args.num_hosts.is_some() {
        let because = "only namespaces have a number";
        return Err(CliError::Conflict { one: "--num-hosts", other: "--hosts local", because });
    }
    check_hosts(args.hosts, args.ranks, num_hosts)?;
    let plan = Plan {
        ranks: args.ranks,
        hosts: args.hosts,
        num_hosts,
        command: args.command.clone(),
        output: Output::Prefixed,
    };
    let ending = launch(&plan)?;
    if let Ending::Failed(failure) = &ending {
        eprintln!("ibex: {failure}");
    }
    Ok(ending.exit_code())
}

/// Refuses shares that are not equal, and more namespaces than there are addresses for.
pub(super) fn check_hosts(hosts: Hosts, ranks: u32, num_hosts: u32) -> Result<(), CliError> {
    let because = match hosts {
        Hosts::Local => return Ok(()),
        Hosts::Netns if num_hosts > HOSTS_MAX => "there are at most 64 namespaces: say --num-hosts",
        Hosts::Netns if !ranks.is_multiple_of(num_hosts) => "every host has the same number of ranks",
        Hosts::Netns => return Ok(()),
    };
    Err(CliError::Conflict { one: "--num-hosts", other: "--ranks", because })
}

/// Starts a group and waits for its end.
pub(super) fn launch(plan: &Plan) -> Result<Ending, LaunchError> {
    let namespaces = match plan.hosts {
        Hosts::Local => None,
        Hosts::Netns => Some(Namespaces::create(plan.num_hosts, plan.ranks / plan.num_hosts)?),
    };
    // Before the first rank: a signal that comes from here on reaches all of them.
    let signals = watch::Signals::catch()?;
    let meeting = Meeting::choose(namespaces.as_ref())?;
    let mut group = watch::Group::default();
    for rank in 0..plan.ranks {
        let seat = Seat::new(plan, rank, namespaces.as_ref());
        group.add(spawn::start(plan, &seat, &meeting)?);
    }
    let ending = group.wait(&signals);
    drop(group);
    drop(namespaces);
    Ok(ending)
}

/// Where a group meets, and what its ranks know of each other.
struct Meeting {
    address: IpAddr,
    port: u16,
    token: String,
}

impl Meeting {
    fn choose(namespaces: Option<&Namespaces>) -> Result<Self, LaunchError> {
        let (address, port) = match namespaces {
            // Nobody else is there to hold a port.
            Some(_) => (Namespaces::address(0, 0), ibex::bootstrap::DEFAULT_PORT),
            None => (IpAddr::from([127, 0, 0, 1]), spawn::free_port()?),
        };
        Ok(Self { address, port, token: spawn::random_token()? })
    }
}

/// One rank's place.
struct Seat<'a> {
    rank: u32,
    local_rank: u32,
    num_local: u32,
    /// Its namespace, and its own address there.
    host: Option<(&'a Namespaces, u32, IpAddr)>,
}

impl<'a> Seat<'a> {
    fn new(plan: &Plan, rank: u32, namespaces: Option<&'a Namespaces>) -> Self {
        let num_local = if namespaces.is_some() { plan.ranks / plan.num_hosts } else { plan.ranks };
        let (host, local_rank) = (rank / num_local, rank % num_local);
        let host = namespaces.map(|spaces| (spaces, host, Namespaces::address(host, local_rank)));
        Self { rank, local_rank, num_local, host }
    }
}
