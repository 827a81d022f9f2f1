//! A process that was stopped, evicted and replaced wakes up in the middle of its kernel: it changes no byte that its
//! successor and the others work with, and it is told that it is out.
//!
//! Every rank is a process of its own: this test binary again, running `one_rank` alone, told what to do and telling
//! what it has seen by lines of text. The survivors are held at a step while the zombie runs on into the next one: so
//! it is stopped in a kernel that has sent and not yet heard, and all that it owes is still to be written.
#![expect(clippy::unwrap_used, reason = "a scenario that cannot be set up is a failed test")]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use ibex::config::{Config, RoutePolicy};
use ibex::error::Error;
use ibex::harness::{RigRank, StepPlan};
use ibex::ids::Rank;
use ibex::membership::RankSet;
use ibex::reference::check::Step;
use ibex::reference::inputs::{InputKey, RankInput};
use ibex::reference::routing::Routing;
use ibex::session::{
    ElasticMember, ElasticOptions, GroupName, MemberFabric, MemberOptions, Session, TopkDtype,
};
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::url::StoreUrl;
use parking_lot::{Condvar, Mutex};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

/// Nobody waits longer for anything; far more than a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(120);
/// Says in the environment what a rank's process is to do: rank, fabric, route, takeover, store.
const ROLE: &str = "IBEX_TEST_ZOMBIE_ROLE";
const RANKS: u16 = 3;
const ZOMBIE: u16 = 2;
const TOKENS: u32 = 8;
/// Steps without a loss before a group counts as whole.
const CLEAN_STEPS: usize = 5;

fn config(route: RoutePolicy) -> Config {
    Config {
        num_ranks: RANKS.into(),
        max_tokens: TOKENS,
        hidden: 256,
        num_experts: 6,
        max_topk: 3,
        detect_ms: 1_000,
        route,
        ..Config::default()
    }
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// One rank. Without the environment variable it is no test.
#[test]
fn one_rank() {
    let Ok(role) = std::env::var(ROLE) else { return };
    // Stopped or not, it ends with its parent.
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let words: Vec<&str> = role.split(' ').collect();
    let [rank, fabric, route, takeover, url] = words[..] else { panic!("{role:?} is no role") };
    let store = StoreUrl::parse(&format!("{url}?timeout-ms=60000")).unwrap();
    let store = Blocking::open(&store, Clock::system(), PATIENCE).unwrap();
    let options = ElasticOptions {
        group: GroupName { cluster: "test".into(), group: "zombies".into() },
        rank: Rank(rank.parse().unwrap()),
        initial: RankSet::first(RANKS.into()),
        takeover: takeover == "true",
        flap_window: None,
        node: MemberOptions {
            fabric: if fabric == "udp" { MemberFabric::Udp } else { MemberFabric::Shm },
            ..MemberOptions::default()
        },
    };
    let member = ElasticMember::join(&config(route.parse().unwrap()), &store, &options).unwrap();
    let limit = Arc::new(AtomicU64::new(0));
    listen(Arc::clone(member.session()), &limit);
    match serve(&member, &limit) {
        Error::Membership(stop) => println!("\nstopped {stop:?}"),
        error => println!("\nfailed {error}"),
    }
    // The process ends with its parent, or by it.
    loop {
        thread::park();
    }
}

/// Does what the lines of the parent say, on a thread of its own; the process ends with its parent.
fn listen(session: Arc<Session>, limit: &Arc<AtomicU64>) {
    let limit = Arc::clone(limit);
    thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let line = line.unwrap();
            match line.split_once(' ') {
                Some(("run", step)) => limit.store(step.parse().unwrap(), Ordering::Relaxed),
                Some(("look", nonce)) => {
                    let live = digest(&session.bytes_in_use_of(Rank(ZOMBIE)).unwrap());
                    let old = digest(&session.quarantined_bytes().unwrap());
                    println!("\nlooked {nonce} {live} {old} {}", session.quarantined_regions());
                }
                _ => panic!("{line:?} is no command"),
            }
        }
        std::process::exit(3);
    });
}

/// Steps up to the limit, for ever; returns why no step may begin any more.
fn serve(member: &ElasticMember, limit: &AtomicU64) -> Error {
    let session = member.session();
    let rank = RigRank {
        tensors: session.tensors().unwrap(),
        stream: session.stream(),
        session: Arc::clone(session),
    };
    match member.wait_linked(PATIENCE) {
        Ok(linked) => assert!(linked, "{:?}", member.view()),
        Err(error) => return error,
    }
    member.ready(1);
    loop {
        match member.wait_open(PATIENCE) {
            Ok(open) => assert!(open, "{:?}", member.view()),
            Err(error) => return error,
        }
        let step = session.next_step();
        if step >= limit.load(Ordering::Relaxed) {
            println!("\nheld {step}");
            while step >= limit.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(1));
            }
        }
        println!("\nbegins {step}");
        match one_step(&rank, step) {
            Ok(said) => println!("\n{said}"),
            Err(Error::Gated(_)) => {}
            Err(error) => return error,
        }
    }
}

fn one_step(rank: &RigRank, step: u64) -> Result<String, Error> {
    let session = &rank.session;
    let (epoch, alive, placement) = (session.epoch(), session.alive(), session.placement());
    let key = |rank| InputKey { seed: 5, iteration: step, rank: Rank(rank) };
    let generate = |rank| RankInput::generate(session.config(), Routing::Uniform, key(rank), TOKENS);
    let inputs: Vec<RankInput> = (0..RANKS).map(generate).collect();
    let input = &inputs[session.rank().index()];
    rank.load(input, TopkDtype::I32)?;
    session.place_experts(&rank.tensors)?;
    rank.launch(session.config().max_topk, &StepPlan::default())?;
    session.gpu().synchronize(&rank.stream)?;
    let reference = Step::new(session.config(), &inputs).placed(&placement, &alive);
    let members: Vec<bool> = (0..RANKS).map(|rank| alive.contains(Rank(rank))).collect();
    let verdict = rank.check_combine(&reference, input, &members)?;
    let everybody = members.iter().all(|alive| *alive);
    Ok(format!("step {step} {} {everybody} {} {}", epoch.0, verdict.wrong, verdict.lost))
}

/// What a process has said so far.
#[derive(Default)]
struct Said {
    lines: Mutex<Vec<String>>,
    grew: Condvar,
}

/// A rank's process; killed when dropped.
struct Process {
    child: Child,
    stdin: ChildStdin,
    said: Arc<Said>,
}

impl Process {
    fn start(rank: u16, fabric: &str, route: RoutePolicy, takeover: bool, url: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "one_rank", "--nocapture", "--test-threads=1"])
            .env(ROLE, format!("{rank} {fabric} {route} {takeover} {url}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let said = Arc::new(Said::default());
        let hears = Arc::clone(&said);
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                hears.lines.lock().push(line);
                hears.grew.notify_all();
            }
        });
        Self { child, stdin, said }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until something in all that was said so far is found.
    fn until<T>(&self, what: &str, find: impl Fn(&[String]) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.said.lines.lock();
        loop {
            if let Some(found) = find(&lines) {
                return found;
            }
            let tail =
                || lines.iter().filter(|line| !line.is_empty()).rev().take(12).cloned().collect::<Vec<_>>();
            assert!(Instant::now() < deadline, "{what} did not happen: {:?}", tail());
            let _ = self.said.grew.wait_until(&mut lines, deadline);
        }
    }

    /// What follows the last line that begins with `word`, as numbers, if there is one.
    fn last(lines: &[String], word: &str) -> Option<Vec<u64>> {
        let line = lines.iter().rev().find_map(|line| line.strip_prefix(word))?;
        Some(line.split_whitespace().map(|number| number.parse().unwrap()).collect())
    }

    /// Waits for steps of everybody without a loss, from step `first` on; the last one's number.
    fn until_clean(&self, first: u64) -> u64 {
        self.until("a run of clean steps", |lines| {
            let clean: Vec<u64> = lines
                .iter()
                .filter_map(|line| line.strip_prefix("step "))
                .map(|line| line.split(' ').collect::<Vec<_>>())
                .filter(|words| words[2..] == ["true", "0", "0"])
                .map(|words| words[0].parse().unwrap())
                .filter(|step| *step >= first)
                .collect();
            (clean.len() >= CLEAN_STEPS).then(|| *clean.last().unwrap())
        })
    }

    /// Digests of what the zombie's rank works with here and of what is in quarantine, and how many regions are.
    fn look(&mut self, nonce: u64) -> [u64; 3] {
        self.tell(&format!("look {nonce}"));
        let word = format!("looked {nonce} ");
        let numbers = self.until("a look", |lines| Self::last(lines, &word));
        numbers.try_into().unwrap()
    }

    fn wrong(&self) -> Vec<String> {
        let is_wrong = |line: &&String| {
            line.strip_prefix("step ").is_some_and(|line| line.split(' ').nth(3) != Some("0"))
        };
        self.said.lines.lock().iter().filter(is_wrong).cloned().collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running `ibex store serve`, killed when dropped.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn store() -> (Served, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ibex"))
        .args(["store", "serve", "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let url = line.trim().strip_prefix("serving ").unwrap().to_owned();
    (Served(child), url)
}

/// Stops a rank inside a kernel, lets it be replaced, and wakes it up. `is_mapped`: by the route asked for, processes
/// write into each other's memory.
fn wake_a_zombie(fabric: &str, route: RoutePolicy, is_mapped: bool) {
    let (_serves, url) = store();
    let mut ranks: Vec<Process> =
        (0..RANKS).map(|rank| Process::start(rank, fabric, route, false, &url)).collect();
    let far = u64::MAX.to_string();
    let held_at = 10;
    for (rank, process) in ranks.iter_mut().enumerate() {
        let limit = if rank == usize::from(ZOMBIE) { &far } else { &held_at.to_string() };
        process.tell(&format!("run {limit}"));
    }
    let zombie = ranks.pop().unwrap();
    for process in &ranks {
        process.until("the hold", |lines| lines.contains(&format!("held {held_at}")).then_some(()));
    }
    zombie.until("a step of its own", |lines| lines.contains(&format!("begins {held_at}")).then_some(()));
    // It has sent what it can soon after, and cannot hear.
    sleep(Duration::from_millis(100));
    zombie.signal(Signal::STOP);
    ranks.iter_mut().for_each(|process| process.tell(&format!("run {far}")));
    // Not before it is missed: a name that is taken over would be evidence enough.
    for process in &ranks {
        process.until("steps without the zombie", |lines| {
            lines.iter().any(|line| line.starts_with("step ") && line.contains(" false ")).then_some(())
        });
    }
    ranks.push(Process::start(ZOMBIE, fabric, route, true, &url));
    ranks[usize::from(ZOMBIE)].tell(&format!("run {far}"));
    let clean = ranks.iter().map(|process| process.until_clean(held_at + 1)).max().unwrap();
    // Nobody does anything any more, but for signs of life.
    let held_at = clean + 200;
    ranks.iter_mut().for_each(|process| process.tell(&format!("run {held_at}")));
    for process in &ranks {
        process.until("the second hold", |lines| lines.contains(&format!("held {held_at}")).then_some(()));
    }
    let before: Vec<_> = ranks[..2].iter_mut().map(|process| process.look(1)).collect();
    zombie.signal(Signal::CONT);
    zombie.until("the word that it is out", |lines| {
        lines.iter().find(|l| l.starts_with("stopped Fenced")).cloned()
    });
    for (process, before) in ranks[..2].iter_mut().zip(before) {
        let [live, old, regions] = before;
        assert_eq!(regions, u64::from(is_mapped));
        let after = process.look(2);
        assert_eq!(after[0], live, "the zombie has written where its successor works");
        assert!(!is_mapped || after[1] != old, "the zombie was not in the middle of anything");
        assert_eq!(after[2], regions);
    }
    drop(zombie);
    for (nonce, process) in (3..).zip(&mut ranks[..2]) {
        let deadline = Instant::now() + PATIENCE;
        while process.look(nonce)[2] != 0 {
            assert!(Instant::now() < deadline, "the quarantine does not end");
        }
    }
    ranks.iter_mut().for_each(|process| process.tell(&format!("run {far}")));
    for process in &ranks {
        process.until_clean(held_at);
        assert_eq!(process.wrong(), Vec::<String>::new());
    }
}

#[test]
fn over_mapped_memory_a_zombie_writes_into_its_own_old_region_only() {
    wake_a_zombie("shm", RoutePolicy::Auto, true);
}

#[test]
fn over_shared_memory_a_zombies_queue_pairs_lead_nowhere() {
    wake_a_zombie("shm", RoutePolicy::Ibgda, false);
}

#[test]
fn over_udp_a_zombies_queue_pairs_lead_nowhere() {
    wake_a_zombie("udp", RoutePolicy::Ibgda, false);
}
