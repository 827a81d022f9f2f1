//! `redis://` and `rediss://`: records in Redis, by scripts that run inside it.
//!
//! Owns one connection that reconnects by itself, and one more per watch. Every operation is one script,
//! so it is atomic; time is the server's. Records are opaque bytes and numbers travel as decimal strings:
//! Lua would round them. What the scripts keep under which key: `redis/store.lua`.
//!
//! Leases of a restarted server start anew, as those of a file do; what survives the restart is what
//! Redis was configured to keep.

use core::time::Duration;
use std::collections::VecDeque;
use std::sync::{Arc, LazyLock};

use async_trait::async_trait;
use redis::aio::{ConnectionManager, ConnectionManagerConfig, MultiplexedConnection};
use redis::{Client, ErrorKind, RedisError, Script, TlsCertificates, Value};

use crate::clock::{Clock, pause, within};
use crate::error::{Bounded, Corruption, Feature, InputError, Result, StoreError};
use crate::ids::{Fence, InstanceId, LeaseId, Revision, Stamp, Version};
use crate::lease::Leased;
use crate::limits::{CELL_LEN_MAX, NAMES_MAX, READERS_MAX, WATCH_QUEUE_LEN};
use crate::name::{Prefix, RecordName};
use crate::record::{Identity, PeerRecord};
use crate::store::{
    Ack, Cell, Change, Claim, Event, Filter, Health, Hold, Listed, Page, ReaderState, Snapshot, Store, Watch,
    WatchSource, check_batch, check_count, check_page, check_ttl,
};
use crate::table::rules::check_owner;

/// All operations; the first argument chooses.
static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("redis/store.lua")));
/// Every key starts with this; the braces keep them on one shard of a cluster.
const PREFIX: &str = "{ibex}:";
/// Operations that may run twice. A connection that was lost while nobody used it is noticed by the first
/// operation after that; these are then tried once more, on a new one.
const REPEATABLE: [&str; 6] = ["get", "list", "readers", "readcell", "health", "renew"];
/// How often a watch looks whether leases ran out; of changes Redis tells it at once.
const LOOK_PERIOD: Duration = Duration::from_millis(20);
/// How long a watch that finds nothing waits at least.
const MIN_WAIT: Duration = Duration::from_micros(500);
/// When to ask again after an outage.
const RETRY: Duration = Duration::from_millis(200);
const CORRUPT: StoreError = StoreError::Corrupt(Corruption::Row);

/// A store in Redis.
#[derive(Clone)]
pub struct RedisStore {
    connection: ConnectionManager,
    client: Client,
    clock: Clock,
    budget: Duration,
}

impl std::fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RedisStore")
    }
}

impl RedisStore {
    /// A client of this server. For `rediss://`, `ca_pem` is the certificate that must have signed the
    /// server's; without it the system's authorities are trusted. Nothing is sent yet; must be called
    /// inside tokio.
    ///
    /// # Errors
    /// [`StoreError::Input`] for a URL or a certificate that Redis' own client does not take.
    pub fn new(url: &str, ca_pem: Option<Vec<u8>>, clock: Clock, budget: Duration) -> Result<Self> {
        let right = "redis://[user:password@]HOST[:PORT][/DATABASE], or rediss:// with a good certificate";
        // The URL may hold a password.
        let refusal = |_| InputError::new("store", "redis URL (not shown)", right);
        let client = match ca_pem {
            None => Client::open(url),
            root_cert => Client::build_with_tls(url, TlsCertificates { client_tls: None, root_cert }),
        };
        let client = client.map_err(refusal)?;
        // One attempt: whether and when to try again is the caller's decision.
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(0)
            .set_connection_timeout(Some(budget))
            .set_response_timeout(Some(budget));
        let connection = ConnectionManager::new_lazy_with_config(client.clone(), config).map_err(refusal)?;
        Ok(Self { connection, client, clock, budget })
    }

    /// Runs one operation. The script's answer is a list whose first element says how it went.
    async fn call(&self, op: &str, args: &[&[u8]]) -> Result<Answer> {
        let mut connection = self.connection.clone();
        let mut invocation = SCRIPT.key(PREFIX);
        invocation.arg(op);
        for arg in args {
            invocation.arg(*arg);
        }
        let reply = async {
            let mut reply: Result<Value, RedisError> = invocation.invoke_async(&mut connection).await;
            let is_lost = |error: &RedisError| error.is_connection_dropped() || error.is_io_error();
            if REPEATABLE.contains(&op) && reply.as_ref().is_err_and(is_lost) {
                reply = invocation.invoke_async(&mut connection).await;
            }
            reply.map_err(|error| failed(&error))
        };
        Answer::new(within(self.budget, reply).await?)?.checked()
    }

    async fn events(&self, connection: &mut MultiplexedConnection, from: Revision) -> Result<Vec<Event>> {
        let (from, limit) = (from.to_string(), WATCH_QUEUE_LEN.to_string());
        let mut invocation = SCRIPT.key(PREFIX);
        invocation.arg("events").arg(from).arg(limit);
        let reply = async {
            let reply: Result<Value, RedisError> = invocation.invoke_async(connection).await;
            reply.map_err(|error| failed(&error))
        };
        let mut answer = Answer::new(within(self.budget, reply).await?)?.checked()?;
        let mut events = Vec::new();
        while !answer.is_empty() {
            events.push(event(&mut answer)?);
        }
        Ok(events)
    }
}

/// What went wrong between us and Redis: an outage, unless Redis says otherwise.
fn failed(error: &RedisError) -> StoreError {
    match error.kind() {
        ErrorKind::AuthenticationFailed => StoreError::Unauthenticated,
        ErrorKind::InvalidClientConfig => StoreError::Unsupported(Feature::Operation),
        _ => StoreError::Unavailable { retry_after: RETRY },
    }
}

/// The elements of a script's answer that are still to be read.
struct Answer(VecDeque<Value>);

impl Answer {
    fn new(value: Value) -> Result<Self> {
        match value {
            Value::Array(values) => Ok(Self(values.into())),
            _ => Err(CORRUPT),
        }
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn bytes(&mut self) -> Result<Vec<u8>> {
        match self.0.pop_front() {
            Some(Value::BulkString(bytes)) => Ok(bytes),
            _ => Err(CORRUPT),
        }
    }

    fn text(&mut self) -> Result<String> {
        String::from_utf8(self.bytes()?).map_err(|_| CORRUPT)
    }

    fn number(&mut self) -> Result<u64> {
        self.text()?.parse().map_err(|_| CORRUPT)
    }

    fn name(&mut self) -> Result<RecordName> {
        RecordName::parse(&self.text()?).map_err(|_| CORRUPT)
    }

    fn millis(&mut self) -> Result<Duration> {
        self.number().map(Duration::from_millis)
    }

    fn instance(&mut self) -> Result<InstanceId> {
        let bytes = self.bytes()?.try_into().map_err(|_| CORRUPT)?;
        InstanceId::from_bytes(bytes).ok_or(CORRUPT)
    }

    /// Takes the first element: `ok`, or an error with its numbers.
    fn checked(mut self) -> Result<Self> {
        Err(match self.text()?.as_str() {
            "ok" => return Ok(self),
            "notfound" => StoreError::NotFound,
            "held" => StoreError::Held { fence: Fence(self.number()?), remaining: self.millis()? },
            "fenced" => StoreError::Fenced { current: Fence(self.number()?) },
            "conflict" => StoreError::Conflict { current: Version(self.number()?) },
            "expired" => StoreError::LeaseExpired { fence: Fence(self.number()?) },
            "names" => too_large(Bounded::Names, self.number()?, NAMES_MAX),
            "readers" => too_large(Bounded::Readers, self.number()?, READERS_MAX),
            _ => CORRUPT,
        })
    }

    /// Name, fence, version, owner and record.
    fn snapshot(&mut self) -> Result<Arc<Snapshot>> {
        let name = self.name()?;
        let stamp = Stamp::new(Fence(self.number()?), Version(self.number()?));
        let owner = Identity::Instance(self.instance()?);
        let encoded = self.bytes()?;
        let mut snapshot = Snapshot::decode(&name, stamp, owner, encoded)?;
        snapshot.identity = snapshot.record.identity;
        Ok(Arc::new(snapshot))
    }
}

fn too_large(what: Bounded, len: u64, limit: usize) -> StoreError {
    StoreError::TooLarge { what, len, limit: limit as u64 }
}

fn event(answer: &mut Answer) -> Result<Event> {
    let revision = Revision(answer.number()?);
    let change = match answer.text()?.as_str() {
        "put" => Change::Put(answer.snapshot()?),
        "expired" => Change::Expired { name: answer.name()?, fence: Fence(answer.number()?) },
        "released" => Change::Released { name: answer.name()?, fence: Fence(answer.number()?) },
        "cell" => Change::Cell { name: answer.name()?, version: Version(answer.number()?) },
        "gap" => Change::Gap,
        _ => return Err(CORRUPT),
    };
    Ok(Event { revision, change })
}

/// Whole milliseconds, rounded up; lengths were checked.
fn millis(duration: Duration) -> String {
    duration.as_nanos().div_ceil(1_000_000).to_string()
}

/// The arguments that every operation of an owner starts with.
fn hold_args(hold: &Hold) -> [Vec<u8>; 4] {
    [
        hold.name.as_str().into(),
        hold.fence.to_string().into(),
        hold.lease.to_string().into(),
        hold.instance.to_bytes().into(),
    ]
}

#[async_trait]
impl Store for RedisStore {
    async fn claim(&self, claim: &Claim) -> Result<Hold> {
        check_ttl(claim.ttl)?;
        let (ttl, limit) = (millis(claim.ttl), NAMES_MAX.to_string());
        let takeover: &[u8] = if claim.takeover { b"1" } else { b"0" };
        let instance = claim.instance.to_bytes();
        let args = [claim.name.as_str().as_bytes(), &instance, ttl.as_bytes(), takeover, limit.as_bytes()];
        let mut answer = self.call("claim", &args).await?;
        let number = answer.number()?;
        let ttl = answer.millis()?;
        let (fence, lease) = (Fence(number), LeaseId(number));
        Ok(Hold { name: claim.name.clone(), instance: claim.instance, fence, lease, ttl })
    }

    async fn publish(&self, hold: &Hold, expect: Version, record: &PeerRecord) -> Result<Version> {
        check_owner(record, hold)?;
        let ([name, fence, lease, instance], bytes) = (hold_args(hold), record.encode()?);
        let expect = expect.to_string();
        let args = [&name[..], &fence, &lease, &instance, expect.as_bytes(), &bytes];
        Ok(Version(self.call("publish", &args).await?.number()?))
    }

    async fn renew(&self, hold: &Hold) -> Result<()> {
        let [name, fence, lease, instance] = hold_args(hold);
        self.call("renew", &[&name, &fence, &lease, &instance]).await.map(|_| ())
    }

    async fn release(&self, hold: &Hold) -> Result<()> {
        let [name, fence, lease, instance] = hold_args(hold);
        self.call("release", &[&name, &fence, &lease, &instance]).await.map(|_| ())
    }

    async fn batch_get(&self, names: &[RecordName]) -> Result<Vec<Result<Leased<Arc<Snapshot>>>>> {
        check_batch(names.len())?;
        let args: Vec<&[u8]> = names.iter().map(|name| name.as_str().as_bytes()).collect();
        let asked_at = self.clock.now();
        let answer = self.call("get", &args).await?;
        let (asked, got) = (names.len() as u64, answer.0.len() as u64);
        if asked != got {
            return Err(StoreError::Corrupt(Corruption::BatchLength { asked, got }));
        }
        let outcome = |value| {
            let mut answer = Answer::new(value)?.checked()?;
            let remaining = answer.millis()?;
            let snapshot = answer.snapshot()?;
            let stamp = snapshot.stamp;
            Ok(Leased::new(snapshot, stamp, asked_at, remaining))
        };
        Ok(answer.0.into_iter().map(outcome).collect())
    }

    async fn list(&self, filter: &Filter) -> Result<Page> {
        check_page(filter)?;
        let after = filter.after.as_ref().map_or("", RecordName::as_str);
        let limit = filter.limit.to_string();
        let args = [filter.prefix.as_str().as_bytes(), after.as_bytes(), limit.as_bytes()];
        let mut answer = self.call("list", &args).await?;
        let mut page = Page { revision: Revision(answer.number()?), ..Page::default() };
        let has_more = answer.text()? == "1";
        while !answer.is_empty() {
            let left = answer.millis()?;
            let remaining = (!left.is_zero()).then_some(left);
            page.entries.push(Listed { snapshot: answer.snapshot()?, remaining });
        }
        if has_more {
            page.next = page.entries.last().map(|entry| entry.snapshot.name.clone());
        }
        Ok(page)
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch> {
        let connect = async {
            let connection = self.client.get_multiplexed_async_connection().await;
            connection.map_err(|error| failed(&error))
        };
        let connection = within(self.budget, connect).await?;
        let (store, prefix) = (self.clone(), prefix.clone());
        Ok(Watch::new(RedisWatch { store, connection, prefix, at: from, ready: VecDeque::new() }))
    }

    async fn ack(&self, ack: &Ack) -> Result<()> {
        check_ttl(ack.ttl)?;
        let (fence, version) = (ack.stamp.fence.to_string(), ack.stamp.version.to_string());
        let (reader, ttl, limit) = (ack.reader.to_bytes(), millis(ack.ttl), READERS_MAX.to_string());
        let name = ack.name.as_str().as_bytes();
        let args = [name, &reader, fence.as_bytes(), version.as_bytes(), ttl.as_bytes(), limit.as_bytes()];
        self.call("ack", &args).await.map(|_| ())
    }

    async fn readers(&self, name: &RecordName) -> Result<Vec<ReaderState>> {
        let mut answer = self.call("readers", &[name.as_str().as_bytes()]).await?;
        let mut readers = Vec::new();
        while !answer.is_empty() {
            let reader = answer.instance()?;
            let stamp = Stamp::new(Fence(answer.number()?), Version(answer.number()?));
            readers.push(ReaderState { reader, stamp, remaining: answer.millis()? });
        }
        readers.sort_by_key(|reader| reader.reader);
        Ok(readers)
    }

    async fn read_cell(&self, name: &RecordName) -> Result<Cell> {
        let mut answer = self.call("readcell", &[name.as_str().as_bytes()]).await?;
        Ok(Cell { version: Version(answer.number()?), value: answer.bytes()? })
    }

    async fn swap_cell(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version> {
        check_count(Bounded::Cell, value.len(), CELL_LEN_MAX)?;
        let (expect, limit) = (expect.to_string(), NAMES_MAX.to_string());
        let args = [name.as_str().as_bytes(), expect.as_bytes(), value, limit.as_bytes()];
        Ok(Version(self.call("swapcell", &args).await?.number()?))
    }

    async fn health(&self) -> Result<Health> {
        let mut answer = self.call("health", &[]).await?;
        Ok(Health {
            up_for: answer.millis()?,
            revision: Revision(answer.number()?),
            num_names: answer.number()?,
        })
    }
}

/// A watch that looks regularly; each look also notices leases that ran out.
struct RedisWatch {
    store: RedisStore,
    connection: MultiplexedConnection,
    prefix: Prefix,
    at: Revision,
    ready: VecDeque<Event>,
}

impl RedisWatch {
    /// Waits on the watch's own connection until the log has another entry, at most one period: leases run
    /// out without one.
    async fn wait(&mut self) -> Result<()> {
        let mut read = redis::cmd("XREAD");
        let period = millis(LOOK_PERIOD);
        read.arg("COUNT").arg(1).arg("BLOCK").arg(period).arg("STREAMS");
        read.arg(format!("{PREFIX}log")).arg(format!("{}-0", self.at));
        let reply = async {
            let reply: Result<Value, RedisError> = read.query_async(&mut self.connection).await;
            reply.map(drop).map_err(|error| failed(&error))
        };
        let asked_at = self.store.clock.now();
        within(self.store.budget, reply).await?;
        // A position that the log never reached would be answered at once, and for ever.
        if self.store.clock.now().since(asked_at) < MIN_WAIT {
            pause(MIN_WAIT).await;
        }
        Ok(())
    }
}

#[async_trait]
impl WatchSource for RedisWatch {
    async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            let events = self.store.events(&mut self.connection, self.at).await?;
            if events.is_empty() {
                self.wait().await?;
                continue;
            }
            self.at = events.last().map_or(self.at, |event| event.revision);
            let covers = |event: &Event| event.change.name().is_none_or(|name| self.prefix.covers(name));
            self.ready = events.into_iter().filter(covers).collect();
        }
    }
}
