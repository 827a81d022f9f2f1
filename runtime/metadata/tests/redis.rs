//! The contract of stores on a real Redis, started on loopback by the harness.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ibex_metadata::clock::Clock;
use ibex_metadata::contract::{self, Subject};
use ibex_metadata::redis::RedisStore;
use ibex_metadata::store::Store;
use parking_lot::Mutex;

/// Generous: the machine may be busy with other things.
const BUDGET: Duration = Duration::from_secs(60);

/// A Redis that writes everything down before it answers, killed when dropped.
struct Redis {
    port: u16,
    dir: PathBuf,
    child: Mutex<Option<Child>>,
}

fn have_redis() -> bool {
    let found = Command::new("redis-server").arg("--version").output().is_ok();
    if !found {
        // Straight to stderr: the runner hides what a passing test prints.
        let why = "SKIPPED: no redis-server (apt-get install redis-server)";
        let _ = writeln!(std::io::stderr(), "{why}");
    }
    found
}

impl Redis {
    async fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("redis-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let redis = Self { port, dir, child: Mutex::new(None) };
        redis.start().await;
        redis
    }

    fn store(&self, clock: Clock) -> RedisStore {
        RedisStore::new(&format!("redis://127.0.0.1:{}", self.port), clock, BUDGET).unwrap()
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
        let port = self.port.to_string();
        let child = Command::new("redis-server")
            .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--daemonize", "no"])
            .args(["--appendonly", "yes", "--appendfsync", "always", "--dir", self.dir.to_str().unwrap()])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        *self.child.lock() = Some(child);
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

#[test]
fn redis_keeps_the_contract() {
    if !have_redis() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let starting = |name: &str| println!("case {name}");
    runtime.block_on(contract::run("", starting, Redis::new));
}
