//! What is left of a group: no process, no shared memory, no interface, no namespace with a name.
//!
//! Processes of one test carry a mark in their environment, by which they are found whoever their parent is.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::group::{Machine, command, text};
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
struct Running(Child);

impl Running {
    fn id(&self) -> u32 {
        self.0.id()
    }

    fn wait(&mut self) -> ExitStatus {
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
    // A rank has memory that others may map once it has joined.
    let works = |rank: &Marked| {
        let files = fs::read_dir(format!("/proc/{}/fd", rank.pid)).into_iter().flatten().flatten();
        rank.rank.is_some() && files.filter_map(|fd| fs::read_link(fd.path()).ok()).any(is_memfd)
    };
    wait_until("three ranks work", || marked(mark).iter().filter(|rank| works(rank)).count() == 3);
    group
}

fn is_memfd(link: std::path::PathBuf) -> bool {
    link.to_string_lossy().starts_with("/memfd:")
}

fn kill(pid: u32, signal: &str) {
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
    kill(victim.pid, "-9");
    let status = group.wait();
    assert_eq!(status.code(), Some(137), "{name}");
    assert!(marked(&mark).is_empty(), "{name}: {:?}", marked(&mark));
}

fn killed_launcher(place: &str, launcher: &[&str], flags: &[&str]) {
    let mark = format!("launcher-{place}-{}", std::process::id());
    let mut group = start(&mark, launcher, flags);
    kill(group.id(), "-9");
    assert_eq!(group.wait().signal(), Some(9));
    expect_nobody(&mark);
}

fn interrupted(place: &str, launcher: &[&str], flags: &[&str]) {
    let mark = format!("interrupt-{place}-{}", std::process::id());
    let mut group = start(&mark, launcher, flags);
    kill(group.id(), "-INT");
    assert_eq!(group.wait().code(), Some(130), "{place}");
    assert!(marked(&mark).is_empty(), "{place}: {:?}", marked(&mark));
}

#[test]
fn ranks_of_a_bench_die_with_the_command_that_started_them() {
    let mark = format!("procs-{}", std::process::id());
    let args = ["bench", "ep", "--procs", "--ranks", "3", "--iters", "1000000", "--detect-ms", "20000"];
    let shape = &shape()[..shape().len() - 2];
    let mut command = command(&[&args, shape].concat());
    command.env("IBEX_TEST_MARK", &mark).stdout(Stdio::null()).stderr(Stdio::null());
    let mut parent = Running(command.spawn().unwrap());
    wait_until("its ranks run", || marked(&mark).iter().filter(|marked| marked.rank.is_some()).count() == 3);
    kill(parent.id(), "-9");
    parent.wait();
    expect_nobody(&mark);
}
