//! `ibex://` on loopback: the contract of stores, and what only a server can get wrong.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use ibex_metadata::clock::Clock;
use ibex_metadata::contract::{self, Cached, Subject};
use ibex_metadata::error::{Corruption, StoreError};
use ibex_metadata::grpc::{Connect, RemoteStore, Secret, Server, ServerConfig, Target, TlsFiles};
use ibex_metadata::ids::{InstanceId, Revision, Version};
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::scope::Request;
use ibex_metadata::store::{Change, Claim, Filter, Store};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;

mod served;
mod spy;
use served::{Running, connect, http_get, loopback, memory, runtime, scratch, tcp};
use spy::{Mood, Spy};

/// A server over a redb file, both driven by one clock that only the test moves.
struct Remote {
    clock: Clock,
    path: PathBuf,
    config: ServerConfig,
    running: Mutex<Option<Running>>,
}

impl Remote {
    fn new() -> Self {
        let mut remote = Self::serving(ServerConfig { listen: loopback(), ..ServerConfig::default() });
        let address = remote.running.get_mut().as_ref().and_then(|running| running.address);
        // The same port after a restart.
        remote.config.listen = address;
        remote
    }

    fn on_a_socket() -> Self {
        Self::serving(ServerConfig { unix: Some(scratch(".sock")), ..ServerConfig::default() })
    }

    fn serving(config: ServerConfig) -> Self {
        let (clock, path) = (Clock::manual(), scratch(".redb"));
        let running = Mutex::new(Some(Self::serve(&config, &path, &clock)));
        Self { clock, path, config, running }
    }

    fn serve(config: &ServerConfig, path: &Path, clock: &Clock) -> Running {
        let store = LocalStore::redb(path, clock.clone()).unwrap();
        Running::start(config.clone(), store, clock.clone())
    }

    fn connect(&self) -> Connect {
        match (&self.config.unix, self.config.listen) {
            (Some(path), _) => connect(Target::Unix(path.clone())),
            (None, Some(address)) => tcp(address),
            (None, None) => panic!("it listens somewhere"),
        }
    }
}

#[async_trait]
impl Subject for Remote {
    async fn client(&self, skew_ns: i64) -> Arc<dyn Store> {
        Arc::new(RemoteStore::new(&self.connect(), self.clock(skew_ns)).unwrap())
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

    async fn kill(&self) -> bool {
        let running = self.running.lock().take();
        running.unwrap().kill();
        true
    }

    async fn start(&self) {
        *self.running.lock() = Some(Self::serve(&self.config, &self.path, &self.clock));
        let store = self.client(0).await;
        for _ in 0..1000 {
            if store.health().await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Some(running) = self.running.lock().take() {
            running.kill();
        }
    }
}

#[test]
fn a_server_over_redb_keeps_the_contract() {
    let starting = |name: &str| println!("case {name}");
    runtime().block_on(contract::run("", starting, async || Remote::new()));
}

#[test]
fn a_server_on_a_unix_socket_keeps_the_same_contract() {
    let starting = |name: &str| println!("case {name}");
    runtime().block_on(contract::run("", starting, async || Remote::on_a_socket()));
}

#[test]
fn a_cache_in_front_of_a_server_keeps_the_contract() {
    let starting = |name: &str| println!("case {name}");
    runtime().block_on(contract::run("", starting, async || Cached(Remote::on_a_socket())));
}

#[test]
fn a_request_resolves_over_a_socket_as_it_does_in_process() {
    runtime().block_on(async {
        let (remote, ttl) = (Remote::on_a_socket(), Duration::from_secs(10));
        let (store, clock) = (remote.client(0).await, remote.clock(0));
        let hold = |name: &str| Claim { ttl, ..claim(name) };
        let short = store.claim(&hold("c/g/short")).await.unwrap();
        let long = store.claim(&hold("c/g/long")).await.unwrap();
        let request = Request::new(clock.clone());
        let scope = request.scope(&*store);
        let missing = RecordName::parse("c/g/none").unwrap();
        let names = [long.name.clone(), missing, short.name.clone()];
        let found = scope.resolve_all(&names).await.unwrap();
        let stamps: Vec<_> = found.iter().map(|guard| guard.as_ref().map(|g| g.stamp().fence).ok()).collect();
        assert_eq!(stamps, [Some(long.fence), None, Some(short.fence)]);
        remote.pass(ttl * 3 / 4).await;
        store.renew(&long).await.unwrap();
        let mut guards = found.into_iter();
        let (mut longer, shorter) = (guards.next().unwrap().unwrap(), guards.nth(1).unwrap().unwrap());
        assert!(longer.wants_renewal());
        longer.renew().await.unwrap();
        remote.pass(ttl / 2).await;
        let expired = StoreError::LeaseExpired { fence: short.fence };
        assert_eq!(shorter.finish(), Err(expired.clone()), "it expired during its use, alone");
        assert_eq!(longer.finish(), Ok(()));
        // Before the next use the server is asked again, and says so itself.
        assert_eq!(scope.resolve(&short.name).await.map(|_| ()), Err(expired));
        assert!(scope.resolve(&long.name).await.is_ok());
    });
}

fn claim(name: &str) -> Claim {
    Claim {
        name: RecordName::parse(name).unwrap(),
        instance: InstanceId::new(1).unwrap(),
        ttl: Duration::from_secs(600),
        takeover: false,
    }
}

#[test]
fn only_the_right_token_gets_in() {
    let token = Secret::new("correct-horse").unwrap();
    let config = ServerConfig { listen: loopback(), token: Some(token.clone()), ..ServerConfig::default() };
    let server = memory(config);
    let address = server.address.unwrap();
    runtime().block_on(async {
        for token in [None, Some(Secret::new("wrong-horse").unwrap())] {
            let store = RemoteStore::new(&Connect { token, ..tcp(address) }, Clock::system()).unwrap();
            assert_eq!(store.health().await, Err(StoreError::Unauthenticated));
            assert_eq!(store.claim(&claim("a/b/c")).await, Err(StoreError::Unauthenticated));
            let watch = store.watch(&Prefix::all(), Revision(0)).await;
            assert_eq!(watch.map(|_| ()), Err(StoreError::Unauthenticated));
        }
        let connect = Connect { token: Some(token), ..tcp(address) };
        let store = RemoteStore::new(&connect, Clock::system()).unwrap();
        assert_eq!(store.health().await.unwrap().num_names, 0, "nothing got in before");
        store.claim(&claim("a/b/c")).await.unwrap();
    });
    server.kill();
}

#[test]
fn tls_is_checked_by_name_and_authority() {
    let made = rcgen::generate_simple_self_signed(vec!["store.example".into()]).unwrap();
    let other = rcgen::generate_simple_self_signed(vec!["store.example".into()]).unwrap();
    let tls = TlsFiles {
        cert_pem: made.cert.pem().into_bytes(),
        key_pem: made.signing_key.serialize_pem().into_bytes(),
    };
    let config = ServerConfig { listen: loopback(), tls: Some(tls), ..ServerConfig::default() };
    let server = memory(config);
    let address = server.address.unwrap();
    let health = async |ca: Option<String>, domain: Option<&str>| {
        let connect =
            Connect { ca_pem: ca.map(String::into_bytes), domain: domain.map(Into::into), ..tcp(address) };
        RemoteStore::new(&connect, Clock::system()).unwrap().health().await
    };
    runtime().block_on(async {
        health(Some(made.cert.pem()), Some("store.example")).await.unwrap();
        for (ca, domain) in [
            (Some(made.cert.pem()), Some("other.example")),
            (Some(other.cert.pem()), Some("store.example")),
            (None, None),
        ] {
            let refused = health(ca, domain).await.unwrap_err();
            assert!(matches!(refused, StoreError::Unavailable { .. }), "{refused:?}");
        }
    });
    server.kill();
}

#[test]
fn a_certificate_that_cannot_be_used_is_refused_before_serving() {
    let tls = Some(TlsFiles { cert_pem: b"no".into(), key_pem: b"pem".into() });
    let config = ServerConfig { listen: loopback(), tls, ..ServerConfig::default() };
    let store = Arc::new(LocalStore::memory(Clock::system()));
    let bound = runtime().block_on(Server::bind(config, store, Clock::system()));
    assert!(bound.is_err_and(|error| error.to_string().contains("certificate")));
}

#[test]
fn a_unix_socket_gives_the_same_semantics_and_is_cleaned_up() {
    let path = scratch(".sock");
    let config = ServerConfig { unix: Some(path.clone()), ..ServerConfig::default() };
    let server = memory(config.clone());
    let second = Arc::new(LocalStore::memory(Clock::system()));
    let taken = runtime().block_on(Server::bind(config.clone(), second, Clock::system()));
    assert!(taken.is_err(), "a socket that answers is not taken over");
    runtime().block_on(async {
        let clock = Clock::system();
        let store = RemoteStore::new(&connect(Target::Unix(path.clone())), clock.clone()).unwrap();
        let hold = store.claim(&claim("a/b/c")).await.unwrap();
        let before = clock.now();
        let names = [RecordName::parse("a/b/none").unwrap(), hold.name.clone()];
        let outcomes = store.batch_get(&names).await.unwrap();
        assert_eq!(outcomes[0], Err(StoreError::NotFound));
        let guard = outcomes[1].as_ref().unwrap();
        // Granted as remaining time, counted here, from before the question.
        assert!(guard.valid_until() > before);
        assert!(guard.valid_until() <= clock.now().after(hold.ttl));
        server.stop.send(()).unwrap();
        assert!(server.ended.await.unwrap());
        let gone = store.health().await.unwrap_err();
        assert!(matches!(gone, StoreError::Unavailable { .. }), "{gone:?}");
    });
    assert!(!path.exists(), "the socket file is removed");
    std::os::unix::net::UnixListener::bind(&path).unwrap();
    memory(config).kill();
}

#[test]
fn stopping_ends_watches_and_waits_for_calls() {
    let server = memory(ServerConfig { listen: loopback(), ..ServerConfig::default() });
    let store = tcp(server.address.unwrap());
    runtime().block_on(async {
        let store = RemoteStore::new(&store, Clock::system()).unwrap();
        let mut watch = store.watch(&Prefix::all(), Revision(0)).await.unwrap();
        let hold = store.claim(&claim("a/b/c")).await.unwrap();
        let event = watch.next().await.unwrap();
        assert_eq!(event.change.name(), Some(&hold.name));
        server.stop.send(()).unwrap();
        let last = watch.next().await.unwrap_err();
        assert!(matches!(last, StoreError::Unavailable { .. }), "{last:?}");
        assert!(server.ended.await.unwrap(), "an orderly end");
    });
}

#[test]
fn a_server_that_does_not_answer_is_a_deadline_or_an_outage() {
    runtime().block_on(async {
        // Accepts, and never says a word.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let budget = Duration::from_millis(300);
        let connect = Connect { budget, ..tcp(silent.local_addr().unwrap()) };
        let store = RemoteStore::new(&connect, Clock::system()).unwrap();
        let error = store.health().await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        let listed = store.list(&Filter::under(Prefix::all())).await;
        assert!(listed.is_err_and(|error| error.is_transient()), "an outage is not an empty list");
    });
}

#[test]
fn metrics_count_calls_and_outcomes() {
    let config = ServerConfig { listen: loopback(), metrics: loopback(), ..ServerConfig::default() };
    let server = memory(config);
    let (address, metrics) = (server.address.unwrap(), server.metrics.unwrap());
    runtime().block_on(async {
        let store = RemoteStore::new(&tcp(address), Clock::system()).unwrap();
        let hold = store.claim(&claim("a/b/c")).await.unwrap();
        store.renew(&hold).await.unwrap();
        let names = vec![hold.name.clone(); 7];
        store.batch_get(&names).await.unwrap();
        assert_eq!(
            store.swap_cell(&hold.name, Version(9), b"").await,
            Err(StoreError::Conflict { current: Version(0) })
        );
        let page = http_get(metrics, "/metrics").await;
        for wanted in [
            "HTTP/1.1 200",
            "ibex_store_up 1",
            "ibex_store_names 1",
            "ibex_store_keys_read_total 7",
            "ibex_store_calls_total{op=\"claim\",outcome=\"ok\"} 1",
            "ibex_store_calls_total{op=\"swap_cell\",outcome=\"conflict\"} 1",
            "ibex_store_call_seconds_count{op=\"renew\"} 1",
        ] {
            assert!(page.contains(wanted), "{wanted} in\n{page}");
        }
        assert!(http_get(metrics, "/other").await.starts_with("HTTP/1.1 404"));
    });
    server.kill();
}

#[test]
fn garbage_is_refused_and_the_server_lives() {
    let server = memory(ServerConfig { listen: loopback(), ..ServerConfig::default() });
    let address = server.address.unwrap();
    runtime().block_on(async {
        let store = RemoteStore::new(&tcp(address), Clock::system()).unwrap();
        let hold = store.claim(&claim("a/b/c")).await.unwrap();
        for garbage in
            [&b"GET / HTTP/1.1\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff", &[0; 4096]]
        {
            let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
            // The server may close before it has read everything.
            let _ = socket.write_all(garbage).await;
            let _ = socket.shutdown().await;
            let mut reply = Vec::new();
            let _ = socket.read_to_end(&mut reply).await;
        }
        assert_eq!(store.renew(&hold).await, Ok(()), "nothing was lost");
        let mut watch = store.watch(&Prefix::all(), Revision(0)).await.unwrap();
        assert!(matches!(watch.next().await.unwrap().change, Change::Put(_)));
    });
    server.kill();
}

/// A server whose store is a spy, and a client with a clock of its own.
fn spied() -> (Arc<Spy>, Running, Clock, RemoteStore) {
    let theirs = Clock::manual();
    let spy = Arc::new(Spy::new(LocalStore::memory(theirs.clone())));
    let config = ServerConfig { listen: loopback(), ..ServerConfig::default() };
    let server = Running::serving(config, spy.clone(), theirs);
    let clock = Clock::manual();
    let _entered = RUNTIME.enter();
    let store = RemoteStore::new(&tcp(server.address.unwrap()), clock.clone()).unwrap();
    (spy, server, clock, store)
}

static RUNTIME: LazyLock<Runtime> = LazyLock::new(runtime);

#[test]
fn the_trip_is_taken_off_the_lease() {
    let (spy, server, clock, store) = spied();
    RUNTIME.block_on(async {
        let hold = spy.inner.claim(&claim("a/b/c")).await.unwrap();
        spy.replies.forget_permits(usize::MAX);
        let (asked_at, name) = (clock.now(), hold.name.clone());
        let asker = tokio::spawn(async move { store.get(&name).await });
        while spy.made.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        clock.advance(Duration::from_secs(3));
        spy.replies.add_permits(1);
        let leased = asker.await.unwrap().unwrap();
        assert_eq!(leased.valid_until(), asked_at.after(hold.ttl), "counted from before the question");
    });
    server.kill();
}

#[test]
fn a_server_that_miscounts_or_mixes_up_is_found_out() {
    let (spy, server, _, store) = spied();
    RUNTIME.block_on(async {
        let holds = [claim("a/b/c"), claim("a/b/d")];
        for claim in &holds {
            spy.inner.claim(claim).await.unwrap();
        }
        let names = holds.map(|claim| claim.name);
        assert!(store.batch_get(&names).await.unwrap().iter().all(Result::is_ok));
        *spy.mood.lock() = Mood::Short;
        let short = StoreError::Corrupt(Corruption::BatchLength { asked: 2, got: 1 });
        assert_eq!(store.batch_get(&names).await.map(|_| ()), Err(short), "no key gets another's answer");
        *spy.mood.lock() = Mood::Reversed;
        let row = StoreError::Corrupt(Corruption::Row);
        let outcomes = store.batch_get(&names).await.unwrap();
        assert_eq!(outcomes, [Err(row.clone()), Err(row)], "the name is read, not the place trusted");
    });
    server.kill();
}
