//! `ibex store` from outside: processes that serve, die and come back, and people who look.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::contract::{OutagePlan, Subject, long_outage};
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::{InstanceId, Version};
use ibex_metadata::name::RecordName;
use ibex_metadata::open::open;
use ibex_metadata::record::{Identity, PeerRecord, RecordState, Tcp, Way};
use ibex_metadata::store::{Claim, Hold, Store};
use ibex_metadata::url::StoreUrl;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};

/// Nothing here takes seconds; a busy machine may.
const PATIENCE: Duration = Duration::from_secs(120);

fn ibex(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ibex")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn scratch(ending: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("store-{}-{}{ending}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// A running `ibex store serve`, killed when dropped.
struct Served {
    child: Child,
    output: BufReader<ChildStdout>,
    url: String,
}

impl Served {
    fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ibex"))
            .args(["store", "serve"])
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let url =
            line.trim().strip_prefix("serving ").unwrap_or_else(|| panic!("it said {line:?}")).to_owned();
        Self { child, output, url }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn client(&self) -> Blocking {
        client(&self.url)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn client(url: &str) -> Blocking {
    let url = StoreUrl::parse(&format!("{url}?timeout-ms=60000")).unwrap();
    Blocking::open(&url, Clock::system(), PATIENCE).unwrap()
}

fn claim(store: &Blocking, name: &str, ttl: Duration) -> Hold {
    let name = RecordName::parse(name).unwrap();
    let instance = InstanceId::new(0xfeed).unwrap();
    store.claim(&Claim { name, instance, ttl, takeover: false }).unwrap()
}

fn ready(hold: &Hold) -> PeerRecord {
    let tcp = Tcp { host: "10.0.0.1".into(), port: 7000, ..Tcp::default() };
    PeerRecord {
        state: RecordState::Ready,
        rank: Some(3),
        transports: vec![Way::Tcp(tcp).into()],
        ..PeerRecord::empty(&hold.name, Identity::Instance(hold.instance))
    }
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "{what} did not happen");
        sleep(Duration::from_millis(20));
    }
}

#[test]
fn people_can_list_show_and_follow() {
    let served = Served::start(&["--listen", "127.0.0.1:0"]);
    let store = served.client();
    let hold = claim(&store, "prod/moe/rank-3", PATIENCE);
    store.publish(&hold, Version(0), &ready(&hold)).unwrap();
    let listed = ibex(&["store", "ls", "--store", &served.url]);
    assert!(listed.status.success());
    let listed = text(&listed.stdout);
    let row = listed.lines().find(|line| line.starts_with("prod/moe/rank-3")).unwrap();
    for wanted in ["ready", " 3 ", "tcp", "0000feed"] {
        assert!(row.contains(wanted), "{wanted} in {row}");
    }
    let other = ibex(&["store", "ls", "--store", &served.url, "prod/other"]);
    assert!(other.status.success() && !text(&other.stdout).contains("rank-3"));
    let shown = ibex(&["store", "get", "--store", &served.url, "prod/moe/rank-3", "prod/moe/none"]);
    assert_eq!(shown.status.code(), Some(1), "one of them is not there");
    assert!(text(&shown.stdout).contains("transport tcp"));
    assert_eq!(text(&shown.stderr).trim(), "ibex: prod/moe/none: no such name");
    let followed = ibex(&["store", "watch", "--store", &served.url, "--from", "0", "--count", "2", "prod"]);
    let lines = text(&followed.stdout);
    let changes: Vec<_> = lines.lines().map(|line| line.split(' ').nth(1).unwrap()).collect();
    assert_eq!(changes, ["put", "put"], "{lines}");
    assert!(lines.lines().last().unwrap().ends_with("ready"), "{lines}");
}

#[test]
fn a_killed_store_comes_back_with_everything_it_acknowledged() {
    let (file, socket) = (scratch(".redb"), scratch(".sock"));
    let url = format!("redb:{}", file.display());
    let socket_url = format!("ibex+unix:{}", socket.display());
    let args = ["--store", &url, "--listen", "127.0.0.1:0", "--unix", socket.to_str().unwrap()];
    let served = Served::start(&args);
    // By the socket, whose name is the same after the restart.
    let store = client(&socket_url);
    let ttl = Duration::from_secs(30);
    let holds: Vec<Hold> = (0..20).map(|i| claim(&store, &format!("c/g/n{i}"), ttl)).collect();
    for hold in &holds {
        store.publish(hold, Version(0), &ready(hold)).unwrap();
    }
    served.signal(Signal::KILL);
    drop(served);
    let away = store.get(&holds[0].name).unwrap_err();
    assert!(matches!(away, StoreError::Unavailable { .. }), "{away:?}");
    let _served = Served::start(&args);
    until("the client's return", || store.health().ok());
    let names: Vec<_> = holds.iter().map(|hold| hold.name.clone()).collect();
    for (hold, outcome) in holds.iter().zip(store.batch_get(&names).unwrap()) {
        let leased = outcome.unwrap();
        assert_eq!((leased.stamp().fence, &leased.unchecked().record), (hold.fence, &ready(hold)));
        store.renew(hold).unwrap();
        assert_eq!(store.publish(hold, Version(1), &ready(hold)), Ok(Version(2)));
    }
}

/// A server process that is killed and started again, on its file and its port.
struct Process {
    address: SocketAddr,
    file: PathBuf,
    served: Mutex<Option<Served>>,
}

#[async_trait]
impl Subject for Process {
    async fn client(&self, skew_ns: i64) -> Arc<dyn Store> {
        let url = StoreUrl::parse(&format!("ibex://{}?timeout-ms=60000", self.address)).unwrap();
        open(&url, self.clock(skew_ns)).unwrap()
    }

    fn clock(&self, skew_ns: i64) -> Clock {
        Clock::system().skewed(skew_ns)
    }

    fn short_ttl(&self) -> Duration {
        Duration::from_secs(2)
    }

    fn address(&self) -> Option<SocketAddr> {
        Some(self.address)
    }

    async fn pass(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    async fn kill(&self) -> bool {
        let served = self.served.lock().take().unwrap();
        served.signal(Signal::KILL);
        true
    }

    async fn start(&self) {
        let (url, listen) = (format!("redb:{}", self.file.display()), self.address.to_string());
        *self.served.lock() = Some(Served::start(&["--store", &url, "--listen", &listen]));
    }
}

#[test]
fn a_long_outage_loses_nothing_and_expires_nobody() {
    let full = std::env::var_os("IBEX_FULL").is_some_and(|value| value == "1");
    let plan = if full { OutagePlan::FULL } else { OutagePlan::SHORT };
    println!("ibex: {plan:?}");
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let process = Process { address, file: scratch(".redb"), served: Mutex::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let report = runtime.block_on(async {
        process.start().await;
        long_outage(&process, plan).await
    });
    println!("ibex: {report:?}");
}

#[test]
fn a_stopped_store_takes_nobodys_lease() {
    let served = Served::start(&["--listen", "127.0.0.1:0"]);
    let store = served.client();
    let ttl = Duration::from_secs(4);
    let hold = claim(&store, "c/g/n", ttl);
    served.signal(Signal::STOP);
    sleep(ttl + ttl / 2);
    served.signal(Signal::CONT);
    // The lease had most of its time left when the store stopped, and has it again.
    assert!(store.get(&hold.name).is_ok(), "the stop counted against the owner");
    // Without a further stop it runs out as usual.
    until("the expiry", || store.get(&hold.name).err());
    assert_eq!(store.get(&hold.name), Err(StoreError::LeaseExpired { fence: hold.fence }));
}

#[test]
fn sigterm_is_an_orderly_end() {
    let socket = scratch(".sock");
    let mut served = Served::start(&["--listen", "127.0.0.1:0", "--unix", socket.to_str().unwrap()]);
    let store = served.client();
    store.health().unwrap();
    served.signal(Signal::TERM);
    assert!(served.child.wait().unwrap().success());
    assert!(!socket.exists(), "the socket file is removed");
    let mut rest = String::new();
    served.output.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "nothing more to say");
}

#[test]
fn metrics_and_tokens_are_wired() {
    let token = scratch(".token");
    std::fs::write(&token, "correct-horse\n").unwrap();
    let path = token.to_str().unwrap();
    let args = ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--token-file", path];
    let mut served = Served::start(&args);
    let mut line = String::new();
    served.output.read_line(&mut line).unwrap();
    assert!(line.starts_with("metrics http://127.0.0.1:"), "{line}");
    let denied = ibex(&["store", "ls", "--store", &served.url]);
    assert_eq!(denied.status.code(), Some(1));
    assert!(text(&denied.stderr).contains("token"), "{}", text(&denied.stderr));
    let allowed = ibex(&["store", "ls", "--store", &format!("{}?token-file={path}", served.url)]);
    assert!(allowed.status.success(), "{}", text(&allowed.stderr));
}

#[test]
fn bad_input_is_refused_with_exit_code_2() {
    let short = scratch(".token");
    std::fs::write(&short, "x").unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let cases: &[(&[&str], &str)] = &[
        (&["serve", "--store", "mysql://x"], "mysql"),
        (&["serve", "--store", "etcd://x"], "etcd://HOST:PORT"),
        (&["serve", "--listen", "nowhere"], "--listen"),
        (&["serve", "--listen", &taken], &taken),
        (&["serve", "--tls-cert", "x.pem"], "--tls-key"),
        (&["serve", "--tls-cert", "no.pem", "--tls-key", "no.pem"], "no.pem"),
        (&["serve", "--token-file", "no/such/file"], "no/such/file"),
        (&["serve", "--token-file", short.to_str().unwrap()], "8 to 4096"),
        (&["ls"], "--store"),
        (&["ls", "--store", "ibex://host"], "ibex://HOST:PORT"),
        (&["ls", "--store", "memory:", "a//b"], "prefix"),
        (&["get", "--store", "memory:"], "NAMES"),
        (&["get", "--store", "memory:", "a/b"], "cluster/group/name"),
        (&["watch", "--store", "memory:", "--from", "x"], "--from"),
        (&["forget"], "forget"),
    ];
    for (args, named) in cases {
        let output = ibex(&[&["store"], *args].concat());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert_eq!(said.trim().lines().count(), 1, "{args:?}: {said}");
        assert!(said.contains(named), "{args:?}: {said}");
    }
    if !cfg!(feature = "k8s") {
        let left_out = ibex(&["store", "ls", "--store", "k8s://default"]);
        assert_eq!(left_out.status.code(), Some(2));
        assert!(text(&left_out.stderr).contains("cargo feature k8s"), "{}", text(&left_out.stderr));
    }
    let nobody = ibex(&["store", "ls", "--store", "ibex://127.0.0.1:1"]);
    assert_eq!(nobody.status.code(), Some(1), "a store that is away is a failure, not a refusal");
    assert!(text(&nobody.stderr).contains("unavailable"), "{}", text(&nobody.stderr));
}
