//! What is left of a group: no process, no shared memory, no interface, no network namespace.
//!
//! Processes of one test carry a mark in their environment, by which they are found whoever their parent is.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::group::{Machine, command, free_port, text};
use crate::shape;

/// Generous: the machine may be busy.
const LONG: Duration = Duration::from_secs(120);

/// A process of a marked group.
#[derive(Debug)]
struct Marked {
    pid: u32,
    rank: Option<String>,
}

/// All living processes that carry a mark.
fn marked(mark: &str) -> Vec<Marked> {
    let pids = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let look = |pid: u32| {
        let environ = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let vars: Vec<String> = environ.split(|byte| *byte == 0).map(text).collect();
        let rank = vars.iter().find_map(|var| Some(var.strip_prefix("RANK=")?.to_string()));
        vars.contains(&format!("IBEX_TEST_MARK={mark}")).then_some(Marked { pid, rank })
    };
    pids.filter_map(look).collect()
}

fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < LONG, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn expect_nobody(mark: &str) {
    wait_until("every process has ended", || marked(mark).is_empty());
}

/// Network namespaces that a process is in, or holds open.
fn namespaces_of(pid: u32) -> BTreeSet<String> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let paths = fds.map(|fd| fd.path()).chain([format!("/proc/{pid}/ns/net").into()]);
    let links = paths.filter_map(|path| Some(fs::read_link(path).ok()?.to_string_lossy().into_owned()));
    links.filter(|link| link.starts_with("net:[")).collect()
}

/// Those of a marked group, but not ours.
fn foreign_namespaces(mark: &str) -> BTreeSet<String> {
    let ours = namespaces_of(std::process::id());
    let all = marked(mark).into_iter().flat_map(|marked| namespaces_of(marked.pid));
    all.filter(|name| !ours.contains(name)).collect()
}

/// A namespace without a name lives as long as somebody is in it or holds it. Waits, because its number may be that of
/// a younger one by now.
fn expect_gone(namespaces: &BTreeSet<String>) {
    let pids =
        || fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    wait_until("nobody holds a namespace of the group", || {
        !pids().any(|pid| !namespaces_of(pid).is_disjoint(namespaces))
    });
}

/// What outlives processes if nobody removes it.
#[derive(Debug, PartialEq, Eq)]
struct Leftovers {
    shared_memory: BTreeSet<String>,
    interfaces: BTreeSet<String>,
    named_namespaces: usize,
}

impl Leftovers {
    fn now() -> Self {
        let names = |dir: &str| {
            let entries = fs::read_dir(dir).into_iter().flatten();
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
        };
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        Self {
            shared_memory: names("/dev/shm"),
            interfaces: names("/sys/class/net"),
            named_namespaces: mounts.lines().filter(|line| line.contains(" - nsfs ")).count(),
        }
    }
}

/// A command that is not left running by a test that failed.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.0.wait().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended needs no end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a group of three that works until it is stopped, and waits until all of it does.
fn start(mark: &str, launcher: &[&str], flags: &[&str]) -> Running {
    let ibex = env!("CARGO_BIN_EXE_ibex");
    let bench = ["--ranks", "3", "--", ibex, "bench", "ep", "--iters", "1000000", "--detect-ms", "20000"];
    let shape = &shape()[..shape().len() - 2];
    let mut command = command(&[&["launch"], launcher, &bench, flags, shape].concat());
    command.env("IBEX_TEST_MARK", mark).stdout(Stdio::null()).stderr(Stdio::null());
    let group = Running(command.spawn().unwrap());
    wait_until("three ranks work", || marked(mark).iter().filter(|rank| works(rank)).count() == 3);
    group
}

/// A rank has memory that others may map once it has joined.
fn works(rank: &Marked) -> bool {
    let files = fs::read_dir(format!("/proc/{}/fd", rank.pid)).into_iter().flatten().flatten();
    rank.rank.is_some() && files.filter_map(|fd| fs::read_link(fd.path()).ok()).any(is_memfd)
}

fn is_memfd(link: std::path::PathBuf) -> bool {
    link.to_string_lossy().starts_with("/memfd:")
}

pub(crate) fn kill(pid: u32, signal: &str) {
    let status = std::process::Command::new("kill").args([signal, &pid.to_string()]).status();
    assert!(status.unwrap().success());
}

/// Where groups run, and what lies between them.
fn places() -> Vec<(&'static str, Vec<&'static str>, Vec<&'static str>)> {
    let mut places = vec![
        ("shm", vec![], vec!["--fabric", "shm"]),
        ("udp", vec![], vec!["--fabric", "udp", "--route", "ibgda"]),
    ];
    if !Machine::lacks_namespaces() {
        places.push(("netns", vec!["--hosts", "netns"], vec!["--fabric", "udp"]));
    }
    places
}

#[test]
fn nothing_is_left_however_a_group_ends() {
    let before = Leftovers::now();
    for (place, launcher, flags) in places() {
        success(place, &launcher, &flags);
        for rank in ["0", "1", "2"] {
            killed_rank(&format!("{place}-{rank}"), &launcher, &flags, rank);
        }
        killed_launcher(place, &launcher, &flags);
        interrupted(place, &launcher, &flags);
    }
    assert_eq!(Leftovers::now(), before);
}

fn success(place: &str, launcher: &[&str], flags: &[&str]) {
    let mark = format!("success-{place}-{}", std::process::id());
    let ibex = env!("CARGO_BIN_EXE_ibex");
    let launch =
        [&["launch"], launcher, &["--ranks", "3", "--", ibex, "bench", "ep"], flags, &shape()].concat();
    let output = command(&launch).env("IBEX_TEST_MARK", &mark).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{place}: {}", text(&output.stderr));
    assert!(marked(&mark).is_empty(), "{place}: {:?}", marked(&mark));
}

fn killed_rank(name: &str, launcher: &[&str], flags: &[&str], rank: &str) {
    let mark = format!("rank-{name}-{}", std::process::id());
    let mut group = start(&mark, launcher, flags);
    let victim = marked(&mark).into_iter().find(|marked| marked.rank.as_deref() == Some(rank)).unwrap();
    let namespaces = foreign_namespaces(&mark);
    assert_eq!(namespaces.is_empty(), launcher.is_empty(), "{name}: {namespaces:?}");
    kill(victim.pid, "-9");
    let status = group.wait();
    assert_eq!(status.code(), Some(137), "{name}");
    assert!(marked(&mark).is_empty(), "{name}: {:?}", marked(&mark));
    expect_gone(&namespaces);
}

fn killed_launcher(place: &str, launcher: &[&str], flags: &[&str]) {
    let mark = format!("launcher-{place}-{}", std::process::id());
    let mut group = start(&mark, launcher, flags);
    let namespaces = foreign_namespaces(&mark);
    kill(group.id(), "-9");
    assert_eq!(group.wait().signal(), Some(9));
    expect_nobody(&mark);
    expect_gone(&namespaces);
}

fn interrupted(place: &str, launcher: &[&str], flags: &[&str]) {
    let mark = format!("interrupt-{place}-{}", std::process::id());
    let mut group = start(&mark, launcher, flags);
    let namespaces = foreign_namespaces(&mark);
    kill(group.id(), "-INT");
    assert_eq!(group.wait().code(), Some(130), "{place}");
    assert!(marked(&mark).is_empty(), "{place}: {:?}", marked(&mark));
    expect_gone(&namespaces);
}

#[test]
fn children_of_a_rank_that_failed_end_with_it() {
    let mark = format!("children-{}", std::process::id());
    let script = "sleep 1000 & (sleep 1000 & wait) & [ $RANK = 0 ] && exit 3; wait";
    let mut command = command(&["launch", "--ranks", "2", "--", "sh", "-c", script]);
    let output = command.env("IBEX_TEST_MARK", &mark).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    expect_nobody(&mark);
}

/// `bench ep --procs` with three ranks that work until they are stopped.
fn start_bench(mark: &str) -> Running {
    let args = ["bench", "ep", "--procs", "--ranks", "3", "--iters", "1000000", "--detect-ms", "20000"];
    let shape = &shape()[..shape().len() - 2];
    let mut command = command(&[&args, shape].concat());
    command.env("IBEX_TEST_MARK", mark).stdout(Stdio::null()).stderr(Stdio::null());
    let parent = Running(command.spawn().unwrap());
    wait_until("its ranks run", || marked(mark).iter().filter(|marked| marked.rank.is_some()).count() == 3);
    parent
}

#[test]
fn ranks_of_a_bench_die_with_the_command_that_started_them() {
    let mark = format!("procs-{}", std::process::id());
    let mut parent = start_bench(&mark);
    kill(parent.id(), "-9");
    parent.wait();
    expect_nobody(&mark);
}

#[test]
fn a_bench_ends_with_the_rank_that_was_killed() {
    let mark = format!("procs-rank-{}", std::process::id());
    let mut parent = start_bench(&mark);
    let victim = marked(&mark).into_iter().find(|marked| marked.rank.as_deref() == Some("1")).unwrap();
    kill(victim.pid, "-9");
    assert_eq!(parent.wait().code(), Some(137));
    expect_nobody(&mark);
}

/// No launcher of ours: whatever sets the variables may end one rank and leave the others to themselves.
#[test]
fn a_rank_without_a_launcher_ends_when_another_is_killed() {
    let mark = format!("alone-{}", std::process::id());
    let port = free_port();
    let start = |number: &str| {
        let mut args = vec!["bench", "ep", "--iters", "1000000", "--detect-ms", "2000"];
        args.extend(&shape()[..shape().len() - 2]);
        let mut command = command(&args);
        command.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port), ("WORLD_SIZE", "2")]);
        command.envs([("RANK", number), ("IBEX_TEST_MARK", &mark)]);
        Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    };
    let (mut first, mut second) = (start("0"), start("1"));
    wait_until("both work", || marked(&mark).iter().filter(|rank| works(rank)).count() == 2);
    kill(second.id(), "-9");
    assert_eq!(second.wait().signal(), Some(9));
    assert_eq!(first.wait().code(), Some(1), "it says that its peer is gone");
    expect_nobody(&mark);
}
