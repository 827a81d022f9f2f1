//! Starting one rank: its environment, its namespace, and its death with the launcher's.
//!
//! Owns nothing; a [`RankProcess`] is handed to the group.
#![expect(unsafe_code, reason = "two system calls between fork and exec")]

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::log::Reader;
use super::{LaunchError, Meeting, Output, Plan, Seat};

/// Ports that no outgoing connection takes by itself: below the range that Linux gives out.
const PORTS: std::ops::Range<u16> = 20_000..30_000;
/// Attempts to find a free one among them.
const PORT_ATTEMPTS: u32 = 100;
/// Bytes of a token, before they are spelled.
const TOKEN_LEN: usize = 16;

/// A started rank.
pub(super) struct RankProcess {
    pub(super) rank: u32,
    pub(super) child: Child,
    /// Read its output; none where it has the launcher's own.
    pub(super) readers: Vec<Reader>,
}

/// Starts one rank. Call from the thread that lives as long as the launcher: the rank dies with that thread.
pub(super) fn start(plan: &Plan, seat: &Seat<'_>, meeting: &Meeting) -> Result<RankProcess, LaunchError> {
    let mut words = plan.command.iter();
    let program = words.next().map_or_else(OsString::new, OsString::clone);
    let mut command = Command::new(&program);
    command.args(words).stdin(Stdio::null()).process_group(0);
    set_environment(&mut command, plan, seat, meeting);
    let is_piped = plan.output == Output::Prefixed || seat.rank != 0;
    if is_piped {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    tie(&mut command, seat.host.map(|(spaces, host, _)| spaces.host(host)));
    let spawned = command.spawn().map_err(|source| LaunchError::Spawn { command: program, source });
    let mut child = spawned?;
    let mut readers = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        readers.push(Reader::of_stdout(seat.rank, stdout)?);
    }
    if let Some(stderr) = child.stderr.take() {
        readers.push(Reader::of_stderr(seat.rank, stderr)?);
    }
    Ok(RankProcess { rank: seat.rank, child, readers })
}

fn set_environment(command: &mut Command, plan: &Plan, seat: &Seat<'_>, meeting: &Meeting) {
    let numbers = [
        ("RANK", seat.rank),
        ("WORLD_SIZE", plan.ranks),
        ("LOCAL_RANK", seat.local_rank),
        ("LOCAL_WORLD_SIZE", seat.num_local),
        ("MASTER_PORT", meeting.port.into()),
    ];
    command.envs(numbers.map(|(name, value)| (name, value.to_string())));
    command.env("MASTER_ADDR", meeting.address.to_string()).env("IBEX_TOKEN", &meeting.token);
    // What another launcher said to this one is not for its ranks.
    for name in ["TORCHELASTIC_RUN_ID", "IBEX_PORT", "POD_IP", "HOST_IP"] {
        command.env_remove(name);
    }
    if let Some((_, _, address)) = seat.host {
        command.env("HOST_IP", address.to_string());
    }
}

/// Has what `command` starts die with this process, and live in a namespace. Spawn it on the thread that lives as long
/// as this process, while the namespace's descriptor is open.
pub(in crate::cli) fn tie(command: &mut Command, namespace: Option<BorrowedFd<'_>>) {
    let launcher = getpid();
    let namespace = namespace.map(|namespace| namespace.as_raw_fd());
    // SAFETY: between fork and exec; `enter` makes system calls only, on a descriptor that is open until `spawn` has
    // returned, as the caller was told.
    unsafe { command.pre_exec(move || enter(launcher, namespace)) };
}

/// Between fork and exec: dies with the launcher from now on, and moves to its host.
fn enter(launcher: Pid, namespace: Option<i32>) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // A launcher that died before the call above sends no signal any more.
    if getppid() != Some(launcher) {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    if let Some(namespace) = namespace {
        // SAFETY: the launcher's descriptor, which a forked process has too.
        let namespace = unsafe { BorrowedFd::borrow_raw(namespace) };
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
    }
    Ok(())
}

fn random<const N: usize>() -> Result<[u8; N], LaunchError> {
    let mut bytes = [0; N];
    getrandom(&mut bytes, GetRandomFlags::empty())
        .map_err(|error| LaunchError::Os { doing: "draw a random number", source: error.into() })?;
    Ok(bytes)
}

/// A token that nobody guesses.
pub(in crate::cli) fn random_token() -> Result<String, LaunchError> {
    let mut token = String::new();
    for byte in random::<TOKEN_LEN>()? {
        let _ = write!(token, "{byte:02x}");
    }
    Ok(token)
}

/// A port of the loopback interface that nobody holds. Rank 0 takes it in a moment; if somebody is faster, rank 0
/// says so.
pub(super) fn free_port() -> Result<u16, LaunchError> {
    for _ in 0..PORT_ATTEMPTS {
        let drawn = u16::from_le_bytes(random()?);
        let port = PORTS.start + drawn % (PORTS.end - PORTS.start);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    let source = io::ErrorKind::AddrInUse.into();
    Err(LaunchError::Os { doing: "find a free port between 20000 and 30000", source })
}
