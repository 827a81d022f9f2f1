//! The contract of stores, on the stores of this process.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ibex_metadata::clock::Clock;
use ibex_metadata::contract::{self, Cached, Subject};
use ibex_metadata::error::StoreError;
use ibex_metadata::local::LocalStore;
use ibex_metadata::store::Store;

/// A store with a clock that only the test moves.
struct Local {
    clock: Clock,
    store: LocalStore,
}

#[async_trait]
impl Subject for Local {
    async fn client(&self, skew_ns: i64) -> Arc<dyn Store> {
        Arc::new(self.store.with_client_clock(self.clock(skew_ns)))
    }

    fn clock(&self, skew_ns: i64) -> Clock {
        self.clock.skewed(skew_ns)
    }

    fn short_ttl(&self) -> Duration {
        Duration::from_secs(10)
    }

    async fn pass(&self, duration: Duration) {
        self.clock.advance(duration);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn starting(name: &str) {
    println!("case {name}");
}

#[test]
fn memory_keeps_the_contract() {
    runtime().block_on(contract::run("", starting, async || {
        let clock = Clock::manual();
        Local { store: LocalStore::memory(clock.clone()), clock }
    }));
}

#[test]
fn a_cache_in_front_keeps_the_contract() {
    runtime().block_on(contract::run("", starting, async || {
        let clock = Clock::manual();
        Cached(Local { store: LocalStore::memory(clock.clone()), clock })
    }));
}

#[test]
fn a_cache_in_front_of_a_file_keeps_the_contract() {
    runtime().block_on(contract::run("", starting, async || {
        let clock = Clock::manual();
        Cached(Local { store: LocalStore::redb(&scratch(), clock.clone()).unwrap(), clock })
    }));
}

fn scratch() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("stores-{}-{}.redb", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn redb_keeps_the_contract() {
    runtime().block_on(contract::run("", starting, async || {
        let clock = Clock::manual();
        Local { store: LocalStore::redb(&scratch(), clock.clone()).unwrap(), clock }
    }));
}

#[test]
fn one_process_has_a_file_at_a_time() {
    let path = scratch();
    let store = LocalStore::redb(&path, Clock::system()).unwrap();
    let second = LocalStore::redb(&path, Clock::system()).unwrap_err();
    assert!(matches!(second, StoreError::Unavailable { .. }), "{second}");
    drop(store);
    LocalStore::redb(&path, Clock::system()).unwrap();
}

#[test]
fn a_file_with_other_contents_is_refused_and_left_alone() {
    let path = scratch();
    let text = b"these are somebody's notes, not a store\n".repeat(500);
    std::fs::write(&path, &text).unwrap();
    let error = LocalStore::redb(&path, Clock::system()).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt(_)), "{error:?}");
    assert_eq!(std::fs::read(&path).unwrap(), text);
    let nowhere = LocalStore::redb(Path::new("no/such/directory/x.redb"), Clock::system()).unwrap_err();
    assert!(matches!(nowhere, StoreError::Unavailable { .. }), "{nowhere:?}");
}
