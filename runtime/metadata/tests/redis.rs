//! The contract of stores on a real Redis, started on loopback by the harness.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ibex_metadata::clock::Clock;
use ibex_metadata::contract::{self, Cached, Subject};
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::{InstanceId, Version};
use ibex_metadata::name::RecordName;
use ibex_metadata::open::open;
use ibex_metadata::record::{Identity, PeerRecord};
use ibex_metadata::redis::RedisStore;
use ibex_metadata::store::{Claim, Store};
use ibex_metadata::url::StoreUrl;
use parking_lot::Mutex;

mod outage;
mod skip;

/// Generous: the machine may be busy with other things.
const BUDGET: Duration = Duration::from_secs(60);

/// A Redis that writes everything down before it answers, killed when dropped.
struct Redis {
    port: u16,
    dir: PathBuf,
    /// Arguments for TLS.
    tls: Vec<String>,
    child: Mutex<Option<Child>>,
}

fn have_redis() -> bool {
    skip::have("redis-server", "--version", "apt-get install redis-server")
}

impl Redis {
    fn prepared() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("redis-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { port, dir, tls: Vec::new(), child: Mutex::new(None) }
    }

    async fn new() -> Self {
        let redis = Self::prepared();
        redis.start().await;
        redis
    }

    /// The same, over TLS alone; its certificate is in the file `ca.pem` of its directory.
    fn over_tls() -> Self {
        let mut redis = Self::prepared();
        let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let file = |name: &str, text: String| {
            let path = redis.dir.join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (cert, key) =
            (file("ca.pem", made.cert.pem()), file("key.pem", made.signing_key.serialize_pem()));
        let port = redis.port.to_string();
        redis.tls = ["--tls-port", &port, "--tls-cert-file", &cert, "--tls-key-file", &key]
            .into_iter()
            .chain(["--tls-ca-cert-file", &cert, "--tls-auth-clients", "no"])
            .map(Into::into)
            .collect();
        redis.spawn();
        redis
    }

    fn spawn(&self) {
        let port = if self.tls.is_empty() { self.port } else { 0 }.to_string();
        let child = Command::new("redis-server")
            .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--daemonize", "no"])
            .args(["--appendonly", "yes", "--appendfsync", "always", "--dir", self.dir.to_str().unwrap()])
            .args(&self.tls)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        *self.child.lock() = Some(child);
    }

    fn store(&self, clock: Clock) -> RedisStore {
        RedisStore::new(&format!("redis://127.0.0.1:{}", self.port), None, clock, BUDGET).unwrap()
    }
}

#[async_trait]
impl Subject for Redis {
    async fn client(&self, skew_ns: i64) -> Arc<dyn Store> {
        Arc::new(self.store(self.clock(skew_ns)))
    }

    fn clock(&self, skew_ns: i64) -> Clock {
        Clock::system().skewed(skew_ns)
    }

    fn short_ttl(&self) -> Duration {
        // Real time: short enough for a short test, long enough for a slow machine.
        Duration::from_millis(1500)
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
        self.spawn();
        let store = self.store(Clock::system());
        for _ in 0..1000 {
            if store.health().await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Redis {
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
fn redis_keeps_the_contract() {
    if have_redis() {
        runtime().block_on(contract::run_at_once(4, Redis::new));
    }
}

#[test]
fn a_cache_in_front_of_redis_keeps_the_contract() {
    if have_redis() {
        runtime().block_on(contract::run_at_once(4, async || Cached(Redis::new().await)));
    }
}

#[test]
fn an_outage_of_redis_loses_nothing_and_expires_nobody() {
    if have_redis() {
        runtime().block_on(async { outage::run("redis", &Redis::new().await).await });
    }
}

#[test]
fn rediss_is_tls_with_a_certificate_that_is_checked() {
    if !have_redis() {
        return;
    }
    let (redis, stranger) = (Redis::over_tls(), Redis::prepared());
    let made = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    std::fs::write(stranger.dir.join("ca.pem"), made.cert.pem()).unwrap();
    let store = |scheme: &str, ca: Option<&Path>| {
        let ca = ca.map(|dir| format!("?ca={}", dir.join("ca.pem").display())).unwrap_or_default();
        let url = StoreUrl::parse(&format!("{scheme}://localhost:{}{ca}", redis.port)).unwrap();
        open(&url, Clock::system()).unwrap()
    };
    runtime().block_on(async {
        let good = store("rediss", Some(&redis.dir));
        for _ in 0..500 {
            if good.health().await.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (name, instance) = (RecordName::parse("a/b/c").unwrap(), InstanceId::new(1).unwrap());
        let claim = Claim { name, instance, ttl: BUDGET, takeover: false };
        good.claim(&claim).await.unwrap();
        assert!(good.get(&claim.name).await.is_ok());
        for bad in [store("rediss", Some(&stranger.dir)), store("rediss", None), store("redis", None)] {
            let refused = bad.get(&claim.name).await.unwrap_err();
            assert!(matches!(refused, StoreError::Unavailable { .. }), "{refused:?}");
        }
    });
}

/// Sends one command without arguments over a connection of its own and answers what came back.
fn bare(port: u16, command: &str, last: &str) -> String {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    socket.write_all(command.as_bytes()).unwrap();
    let mut reply = Vec::new();
    while !String::from_utf8_lossy(&reply).contains(last) {
        let mut part = [0; 4096];
        let len = socket.read(&mut part).unwrap();
        assert!(len > 0, "redis hung up");
        reply.extend_from_slice(&part[..len]);
    }
    String::from_utf8(reply).unwrap()
}

/// How often Redis carried a command out, by its own statistics.
fn calls(statistics: &str, command: &str) -> u64 {
    let start = format!("cmdstat_{command}:calls=");
    let line = statistics.lines().find_map(|line| line.strip_prefix(&start));
    line.map_or(0, |rest| rest.split(',').next().unwrap().parse().unwrap())
}

#[test]
fn a_batch_of_1024_names_is_one_round_trip() {
    const KEYS: usize = 1024;
    if !have_redis() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let redis = Redis::new().await;
        let store = redis.store(Clock::system());
        let mut names: Vec<RecordName> = Vec::new();
        for index in 0..KEYS {
            let name = RecordName::new("c", "g", &format!("n{index}")).unwrap();
            names.push(name.clone());
            // Every other one: absence is an answer of the same round trip.
            if index % 2 == 0 {
                let (instance, ttl) = (InstanceId::new(1).unwrap(), Duration::from_secs(600));
                let hold = store.claim(&Claim { name, instance, ttl, takeover: false }).await.unwrap();
                let record = PeerRecord::empty(&hold.name, Identity::Instance(instance));
                store.publish(&hold, Version(0), &record).await.unwrap();
            }
        }
        // Once before, so that neither connecting nor loading a script is counted.
        store.batch_get(&names).await.unwrap();
        bare(redis.port, "CONFIG RESETSTAT\r\n", "+OK\r\n");
        let outcomes = store.batch_get(&names).await.unwrap();
        let statistics = bare(redis.port, "INFO commandstats\r\n", "cmdstat_");
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), KEYS / 2);
        assert_eq!(calls(&statistics, "evalsha"), 1, "{statistics}");
        assert_eq!(calls(&statistics, "eval") + calls(&statistics, "script|load"), 0, "{statistics}");
        // Whatever else was carried out was so inside that script, which asks the time once.
        assert_eq!(calls(&statistics, "time"), 1, "{statistics}");
    });
}
