//! The processes of a campaign: ranks, the store, and the thread that follows the view in it.
//!
//! A [`RankProcess`] owns its child and its standard input; a thread reads what it says and ends with it. Whatever ends
//! the supervisor, the kernel ends them.

use core::time::Duration;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};

use ibex::chaos::procs::{Order, Role, Seen, Word};
use ibex::ids::Rank;
use ibex::membership::{Instance, View};
use ibex::time::{sleep, unix_ns};
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::error::{Result as StoreResult, StoreError};
use ibex_metadata::ids::Version;
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::store::Change;
use ibex_metadata::url::StoreUrl;
use rustix::process::{Pid, Signal, kill_process};

use crate::cli::launch::{LaunchError, random_token, tie};

/// How often the follower looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);
/// Pause after the store did not answer.
const PAUSE: Duration = Duration::from_millis(5);
/// How long one question to the store may take.
const STORE_BUDGET: Duration = Duration::from_secs(1);

/// What comes in while a campaign runs.
pub(super) enum Heard {
    /// From the process with this number.
    Word(u64, Word),
    /// Something that is no word.
    Noise(u64, String),
    /// A version of the view, and when it was read.
    View(u64, Box<View>),
}

/// One incarnation of a rank.
pub(super) struct RankProcess {
    pub(super) id: u64,
    pub(super) role: Role,
    pub(super) seen: Seen,
    /// It was sent SIGKILL, or told to end by it.
    pub(super) is_condemned: bool,
    pub(super) is_stopped: bool,
    pub(super) has_baseline: bool,
    pub(super) is_done: bool,
    pub(super) is_gone: bool,
    child: Child,
    orders: Option<ChildStdin>,
    reader: Option<JoinHandle<()>>,
}

/// Where a rank runs: its namespace, and its address there.
pub(super) type Host<'a> = Option<(BorrowedFd<'a>, IpAddr)>;

fn os(doing: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError::Os { doing, source }
}

fn this_program() -> Result<PathBuf, LaunchError> {
    std::env::current_exe().map_err(os("find this program"))
}

impl RankProcess {
    /// Starts a rank and tells it who to be.
    pub(super) fn start(
        id: u64,
        role: Role,
        host: Host<'_>,
        heard: &Sender<Heard>,
    ) -> Result<Self, LaunchError> {
        let mut command = Command::new(this_program()?);
        command.arg("chaos-rank").stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        // What a launcher said to the supervisor is not for its ranks.
        for name in ["HOST_IP", "POD_IP"] {
            command.env_remove(name);
        }
        if let Some((_, address)) = host {
            command.env("HOST_IP", address.to_string());
        }
        tie(&mut command, host.map(|(namespace, _)| namespace));
        let started_ns = unix_ns();
        let mut child = command.spawn().map_err(os("start a rank"))?;
        let mut orders = child.stdin.take();
        let reader = child.stdout.take().map(|out| read(id, out, heard.clone())).transpose()?;
        if let Some(orders) = &mut orders {
            write_order(orders, &Order::Be(Box::new(role.clone()))).map_err(os("tell a rank who to be"))?;
        }
        let seen = Seen { instance: Instance::NONE, started_ns, is_doomed: false };
        Ok(Self {
            id,
            role,
            seen,
            is_condemned: false,
            is_stopped: false,
            has_baseline: false,
            is_done: false,
            is_gone: false,
            child,
            orders,
            reader,
        })
    }

    pub(super) fn rank(&self) -> Rank {
        Rank(self.role.rank)
    }

    /// Tells it something. One that has ended hears nothing; that is found out elsewhere.
    pub(super) fn tell(&mut self, order: &Order) {
        if let Some(orders) = &mut self.orders
            && write_order(orders, order).is_err()
        {
            self.orders = None;
        }
    }

    pub(super) fn signal(&self, signal: Signal) {
        // A process that has ended and was not waited for keeps its number.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// Ends it as nothing can prevent.
    pub(super) fn kill(&mut self) {
        self.is_condemned = true;
        self.seen.is_doomed = true;
        self.signal(Signal::KILL);
    }

    /// Takes in the last that it said; it has ended.
    pub(super) fn hear_out(&mut self) {
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }

    /// Its end, if it has come.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        // A child that cannot be waited for is gone.
        self.child.try_wait().unwrap_or_else(|_| Some(ExitStatus::default()))
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        // One that has ended is not hurt by it.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.hear_out();
    }
}

fn write_order(to: &mut ChildStdin, order: &Order) -> io::Result<()> {
    // PANIC: numbers and texts always serialise.
    let line = serde_json::to_string(order).expect("orders are plain data") + "\n";
    to.write_all(line.as_bytes())
}

fn read(
    id: u64,
    out: impl io::Read + Send + 'static,
    heard: Sender<Heard>,
) -> Result<JoinHandle<()>, LaunchError> {
    let read = move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            let what = match serde_json::from_str(&line) {
                Ok(word) => Heard::Word(id, word),
                Err(_) => Heard::Noise(id, line),
            };
            if heard.send(what).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("ibex-words".into()).spawn(read).map_err(os("start a thread"))
}

/// A directory of this campaign's own, gone with it.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn create() -> Result<Self, LaunchError> {
        let token = random_token()?;
        let path = std::env::temp_dir().join(format!("ibex-chaos-{}", &token[..12]));
        fs::create_dir(&path).map_err(os("make a directory for the store"))?;
        Ok(Self(path))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed was removed by somebody else, or stays for him to see.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `ibex store serve` in a process of its own, on a file that outlives it.
pub(super) struct StoreProcess {
    child: Option<Child>,
    scratch: Scratch,
}

impl StoreProcess {
    pub(super) fn start() -> Result<Self, LaunchError> {
        let mut store = Self { child: None, scratch: Scratch::create()? };
        store.set_up(true)?;
        Ok(store)
    }

    /// Where ranks find it: by a path, which namespaces do not hide.
    pub(super) fn url(&self) -> String {
        format!("ibex+unix:{}?timeout-ms=2000", self.scratch.file("socket").display())
    }

    /// Kills it, or starts it again.
    pub(super) fn set_up(&mut self, up: bool) -> Result<(), LaunchError> {
        match (&mut self.child, up) {
            (Some(child), false) => {
                end(child);
                self.child = None;
            }
            (None, true) => {
                let url = format!("redb:{}", self.scratch.file("records.redb").display());
                let mut command = Command::new(this_program()?);
                command.args(["store", "serve", "--listen", "127.0.0.1:0", "--store", &url, "--unix"]);
                command.arg(self.scratch.file("socket"));
                command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
                tie(&mut command, None);
                self.child = Some(command.spawn().map_err(os("start the store"))?);
            }
            _ => {}
        }
        Ok(())
    }
}

impl Drop for StoreProcess {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

fn end(child: &mut Child) {
    // One that has ended is not hurt by it.
    let _ = child.kill();
    let _ = child.wait();
}

/// Follows the view's cell on a thread of its own: a store that is away stops nobody else.
pub(super) struct Follower {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    pub(super) fn start(url: &StoreUrl, group: &str, heard: Sender<Heard>) -> Result<Self, LaunchError> {
        let is_over = Arc::new(AtomicBool::new(false));
        let (over, url, group) = (Arc::clone(&is_over), url.clone(), group.to_owned());
        let follow = move || {
            let mut version = Version(0);
            while !over.load(Ordering::Relaxed) {
                // Whatever went wrong, the next attempt reads all there is.
                if follow_once(&url, &group, &heard, &mut version, &over).is_err() {
                    sleep(PAUSE);
                }
            }
        };
        let thread = thread::Builder::new().name("ibex-view".into()).spawn(follow);
        Ok(Self { is_over, thread: Some(thread.map_err(os("start a thread"))?) })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn follow_once(
    url: &StoreUrl,
    group: &str,
    heard: &Sender<Heard>,
    version: &mut Version,
    over: &AtomicBool,
) -> StoreResult<()> {
    let store = Blocking::open(url, Clock::system(), STORE_BUDGET)?;
    let name = RecordName::new("chaos", group, "view")?;
    let mut watch = store.watch(&Prefix::parse(&format!("chaos/{group}"))?, store.health()?.revision)?;
    let mut look = true;
    while !over.load(Ordering::Relaxed) {
        if look {
            match store.read_cell(&name) {
                Ok(cell) if cell.version != *version => {
                    *version = cell.version;
                    if let Ok(view) = View::from_bytes(&cell.value) {
                        let _ = heard.send(Heard::View(unix_ns(), Box::new(view)));
                    }
                }
                Ok(_) | Err(StoreError::NotFound) => {}
                Err(error) => return Err(error),
            }
        }
        look = match watch.next(LOOK)? {
            Some(event) => match event.change {
                Change::Cell { name: changed, .. } => changed == name,
                Change::Gap => true,
                _ => false,
            },
            None => false,
        };
    }
    Ok(())
}

/// Entries of a directory of the system.
pub(super) fn count_entries(path: impl AsRef<Path>) -> u64 {
    fs::read_dir(path).map_or(0, |entries| entries.count() as u64)
}
