//! The contract of stores on a real etcd, started on loopback by the harness.

#![cfg(feature = "etcd")]
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ibex_metadata::clock::Clock;
use ibex_metadata::contract::{self, Cached, Subject};
use ibex_metadata::error::StoreError;
use ibex_metadata::etcd::{EtcdConnect, EtcdStore, Login};
use ibex_metadata::ids::{InstanceId, Revision, Version};
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::open::open;
use ibex_metadata::store::{Change, Claim, Store};
use ibex_metadata::url::StoreUrl;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

mod outage;
mod skip;

/// Generous: the machine may be busy with other things.
const BUDGET: Duration = Duration::from_secs(60);

/// An etcd with one member, killed when dropped.
struct Etcd {
    port: u16,
    peer_port: u16,
    dir: PathBuf,
    /// Clients speak TLS; the certificate is in the file `ca.pem` of the directory.
    has_tls: bool,
    child: Mutex<Option<Child>>,
}

fn have_etcd() -> bool {
    skip::have("etcd", "--version", "apt-get install etcd-server")
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Etcd {
    async fn new() -> Self {
        let etcd = Self::prepared(false);
        etcd.start().await;
        etcd
    }

    async fn over_tls() -> Self {
        let etcd = Self::prepared(true);
        let made = rcgen::generate_simple_self_signed(vec!["etcd.example".into()]).unwrap();
        std::fs::write(etcd.file("ca.pem"), made.cert.pem()).unwrap();
        std::fs::write(etcd.file("key.pem"), made.signing_key.serialize_pem()).unwrap();
        etcd.start().await;
        etcd
    }

    fn prepared(has_tls: bool) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("etcd-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let (port, peer_port) = (free_port(), free_port());
        std::fs::create_dir_all(dir.join("data")).unwrap();
        Self { port, peer_port, dir, has_tls, child: Mutex::new(None) }
    }

    fn file(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }

    /// As the URL says it.
    fn url(&self, options: &str) -> Arc<dyn Store> {
        let url = format!("etcd://127.0.0.1:{}?timeout-ms=60000{options}", self.port);
        open(&StoreUrl::parse(&url).unwrap(), Clock::system()).unwrap()
    }

    fn connect(&self) -> EtcdConnect {
        let authority = format!("127.0.0.1:{}", self.port);
        let ca_pem = self.has_tls.then(|| std::fs::read(self.file("ca.pem")).unwrap());
        let domain = self.has_tls.then(|| "etcd.example".to_owned());
        EtcdConnect { authority, ca_pem, domain, login: None, budget: BUDGET }
    }

    fn store(&self, clock: Clock) -> EtcdStore {
        EtcdStore::new(&self.connect(), clock).unwrap()
    }

    /// What the client does not need itself, over etcd's own JSON gateway.
    async fn post(&self, path: &str, json: &str) -> String {
        let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        let len = json.len();
        let head =
            format!("POST /v3/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}");
        socket.write_all(format!("{head}\r\n\r\n{json}").as_bytes()).await.unwrap();
        let mut reply = String::new();
        socket.read_to_string(&mut reply).await.unwrap();
        assert!(reply.starts_with("HTTP/1.1 200"), "{path}: {reply}");
        reply
    }
}

#[async_trait]
impl Subject for Etcd {
    async fn client(&self, skew_ns: i64) -> Arc<dyn Store> {
        Arc::new(self.store(self.clock(skew_ns)))
    }

    fn clock(&self, skew_ns: i64) -> Clock {
        Clock::system().skewed(skew_ns)
    }

    fn short_ttl(&self) -> Duration {
        // Whole seconds, and not less than etcd's own minimum; long enough for a slow machine.
        Duration::from_secs(4)
    }

    fn lag(&self) -> Duration {
        // It looks every half second.
        Duration::from_secs(2)
    }

    fn address(&self) -> Option<SocketAddr> {
        Some(([127, 0, 0, 1], self.port).into())
    }

    async fn pass(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    async fn kill(&self) -> bool {
        let mut child = self.child.lock().take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        true
    }

    async fn start(&self) {
        let scheme = if self.has_tls { "https" } else { "http" };
        let client = format!("{scheme}://127.0.0.1:{}", self.port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let (cert, key) = (self.file("ca.pem"), self.file("key.pem"));
        let tls = ["--cert-file", &cert, "--key-file", &key];
        let child = Command::new("etcd")
            .args(tls.iter().filter(|_| self.has_tls))
            .args(["--data-dir", &self.file("data"), "--logger", "zap", "--log-level", "error"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        *self.child.lock() = Some(child);
        let store = self.store(Clock::system());
        for _ in 0..3000 {
            if store.health().await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.lock().take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        // The directory of the test run is removed with the target directory at the latest.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn etcd_keeps_the_contract() {
    if have_etcd() {
        runtime().block_on(contract::run_at_once(6, Etcd::new));
    }
}

#[test]
fn a_cache_in_front_of_etcd_keeps_the_contract() {
    if have_etcd() {
        runtime().block_on(contract::run_at_once(6, async || Cached(Etcd::new().await)));
    }
}

#[test]
fn an_outage_of_etcd_loses_nothing_and_expires_nobody() {
    if have_etcd() {
        runtime().block_on(async { outage::run("etcd", &Etcd::new().await).await });
    }
}

#[test]
fn etcd_over_tls_is_believed_by_its_certificate_alone() {
    if !have_etcd() {
        return;
    }
    runtime().block_on(async {
        let etcd = Etcd::over_tls().await;
        let stranger = rcgen::generate_simple_self_signed(vec!["etcd.example".into()]).unwrap();
        std::fs::write(etcd.file("stranger.pem"), stranger.cert.pem()).unwrap();
        let with = |ca: &str, domain: &str| etcd.url(&format!("&ca={}&domain={domain}", etcd.file(ca)));
        let good = with("ca.pem", "etcd.example");
        let hold = good.claim(&claim("a/b/c")).await.unwrap();
        let mut watch = good.watch(&Prefix::all(), Revision(0)).await.unwrap();
        assert!(matches!(watch.next().await.unwrap().change, Change::Put(_) | Change::Gap));
        assert_eq!(good.renew(&hold).await, Ok(()));
        for bad in [with("stranger.pem", "etcd.example"), with("ca.pem", "other.example"), etcd.url("")] {
            let refused = bad.get(&hold.name).await.unwrap_err();
            assert!(matches!(refused, StoreError::Unavailable { .. }), "{refused:?}");
        }
    });
}

fn claim(name: &str) -> Claim {
    let (name, instance) = (RecordName::parse(name).unwrap(), InstanceId::new(1).unwrap());
    Claim { name, instance, ttl: Duration::from_secs(600), takeover: false }
}

#[test]
fn what_etcd_compacted_away_is_a_gap() {
    if !have_etcd() {
        return;
    }
    runtime().block_on(async {
        let etcd = Etcd::new().await;
        let store = etcd.store(Clock::system());
        let start = store.health().await.unwrap().revision;
        let hold = store.claim(&claim("a/b/c")).await.unwrap();
        let mut watch = store.watch(&Prefix::all(), start).await.unwrap();
        assert!(matches!(watch.next().await.unwrap().change, Change::Put(_)), "nothing is compacted yet");
        for version in 0..5 {
            store.swap_cell(&hold.name, Version(version), b"x").await.unwrap();
        }
        let newest = store.health().await.unwrap().revision;
        etcd.post("kv/compaction", &format!("{{\"revision\": {newest}}}")).await;
        let mut late = store.watch(&Prefix::all(), start).await.unwrap();
        let gap = late.next().await.unwrap();
        assert_eq!((gap.change, gap.revision), (Change::Gap, newest));
        store.swap_cell(&hold.name, Version(5), b"x").await.unwrap();
        let next = late.next().await.unwrap();
        assert!(matches!(next.change, Change::Cell { version: Version(6), .. }), "{next:?}");
        assert!(next.revision > gap.revision);
        // Who was there all along missed nothing.
        for version in 1..=6 {
            let event = watch.next().await.unwrap();
            assert_eq!(event.change, Change::Cell { name: hold.name.clone(), version: Version(version) });
        }
    });
}

#[test]
fn only_who_logs_in_gets_in() {
    if !have_etcd() {
        return;
    }
    runtime().block_on(async {
        let etcd = Etcd::new().await;
        etcd.post("auth/user/add", r#"{"name": "root", "password": "correct-horse"}"#).await;
        etcd.post("auth/role/add", r#"{"name": "root"}"#).await;
        etcd.post("auth/user/grant", r#"{"user": "root", "role": "root"}"#).await;
        etcd.post("auth/enable", "{}").await;
        let with = |password: &str| {
            let login = Login { user: "root".into(), password: password.into() };
            assert!(!format!("{login:?}").contains(password));
            let connect = EtcdConnect { login: Some(login), ..etcd.connect() };
            EtcdStore::new(&connect, Clock::system()).unwrap()
        };
        for store in [etcd.store(Clock::system()), with("wrong-horse")] {
            assert_eq!(store.health().await, Err(StoreError::Unauthenticated));
            assert_eq!(store.claim(&claim("a/b/c")).await, Err(StoreError::Unauthenticated));
            let watch = store.watch(&Prefix::all(), Revision(0)).await;
            assert_eq!(watch.map(|_| ()), Err(StoreError::Unauthenticated));
        }
        let store = with("correct-horse");
        let hold = store.claim(&claim("a/b/c")).await.unwrap();
        assert_eq!(store.renew(&hold).await, Ok(()));
    });
}
