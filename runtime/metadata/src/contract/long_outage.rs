//! A store that is killed in the middle of its work, stays away for longer than any lease, and returns.

use core::time::Duration;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::{Subject, claim, ready};
use crate::clock::{Clock, pause};
use crate::error::StoreError;
use crate::ids::Version;
use crate::layered::Layered;
use crate::name::{Prefix, RecordName};
use crate::record::PeerRecord;
use crate::store::{Filter, Hold, Store};

/// Owners that publish all along.
const WRITERS: u32 = 4;
/// How often an owner publishes, and how often somebody asks during the outage.
const WRITE_PERIOD: Duration = Duration::from_millis(20);
const ASK_PERIOD: Duration = Duration::from_millis(250);
/// Connections that one question, or one look of a cache, may cost.
const CONNECTIONS_PER_QUESTION: u64 = 2;
/// How long a store may take to return on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long everything takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutagePlan {
    /// How long owners publish before the store is killed.
    pub before: Duration,
    /// How long the store is away: longer than the leases.
    pub outage: Duration,
    /// The leases.
    pub ttl: Duration,
}

impl OutagePlan {
    /// A short outage for every run.
    pub const SHORT: Self =
        Self { before: Duration::from_secs(1), outage: Duration::from_secs(7), ttl: Duration::from_secs(5) };
    /// The outage that the design promises to bear.
    pub const FULL: Self = Self {
        before: Duration::from_secs(5),
        outage: Duration::from_secs(60),
        ttl: Duration::from_secs(20),
    };
}

/// What an outage came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutageReport {
    /// Publications that were acknowledged, before and after.
    pub acknowledged: u64,
    /// Questions asked during the outage, all of them answered with "unavailable".
    pub unavailable: u64,
    /// Connections that clients tried during the outage.
    pub connections: u64,
    /// For how long the store said that it had been up when it was first asked again.
    pub up_for: Duration,
}

/// An owner that publishes its version as its rank, and keeps count of what was acknowledged.
struct Writer {
    hold: Hold,
    acknowledged: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Writer {
    async fn start(store: Arc<dyn Store>, number: u32, ttl: Duration, stop: Arc<AtomicBool>) -> Self {
        let name = RecordName::new("outage", "writers", &format!("writer-{number}")).expect("a good name");
        let hold = store.claim(&claim(&name, u128::from(number) + 1, ttl)).await.expect("the name is free");
        let acknowledged = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(write(store, hold.clone(), Arc::clone(&acknowledged), stop));
        Self { hold, acknowledged, task }
    }
}

/// Publishes one version after the other. An answer that was lost leaves open whether the write took
/// effect: the store says so in its next refusal.
async fn write(store: Arc<dyn Store>, hold: Hold, acknowledged: Arc<AtomicU64>, stop: Arc<AtomicBool>) {
    let mut at = 0;
    while !stop.load(Ordering::SeqCst) {
        let rank = u32::try_from(at + 1).expect("a short test");
        let record = PeerRecord { rank: Some(rank), ..ready(&hold) };
        match store.publish(&hold, Version(at), &record).await {
            Ok(version) => {
                at = version.0;
                acknowledged.store(at, Ordering::SeqCst);
            }
            Err(StoreError::Conflict { current }) => {
                assert_eq!(current.0, at + 1, "at most the write whose answer was lost");
                at = current.0;
            }
            Err(error) => wait_out(&hold, &error).await,
        }
        if let Err(error) = store.renew(&hold).await {
            wait_out(&hold, &error).await;
        }
        pause(WRITE_PERIOD).await;
    }
}

/// Waits as long as an outage asks for; nothing else may go wrong.
async fn wait_out(hold: &Hold, error: &StoreError) {
    assert!(error.is_transient(), "writer {}: {error}", hold.name);
    if let StoreError::Unavailable { retry_after } = error {
        pause(*retry_after).await;
    }
}

/// Counts who knocks where the store was.
struct Door {
    knocks: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Door {
    async fn open(subject: &dyn Subject) -> Self {
        let knocks = Arc::new(AtomicU64::new(0));
        let address = subject.address().expect("the store listens on TCP");
        let listener = TcpListener::bind(address).await.expect("the store left its port");
        let seen = Arc::clone(&knocks);
        let task = tokio::spawn(async move {
            while listener.accept().await.is_ok() {
                seen.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { knocks, task }
    }

    /// Frees the port.
    async fn close(self) -> u64 {
        self.task.abort();
        let _ = self.task.await;
        self.knocks.load(Ordering::SeqCst)
    }
}

/// Asks all along, and gets no answer that could be taken for one. How often was asked.
async fn ask_in_vain(store: &dyn Store, name: &RecordName, clock: &Clock, outage: Duration) -> u64 {
    let mut asked = 0;
    let end = clock.now().after(outage);
    while clock.now() < end {
        let read = store.get(name).await;
        assert!(read.as_ref().is_err_and(StoreError::is_transient), "{read:?}");
        let listed = store.list(&Filter::under(Prefix::all())).await;
        assert!(listed.as_ref().is_err_and(StoreError::is_transient), "an outage is no empty list");
        asked += 2;
        pause(ASK_PERIOD).await;
    }
    asked
}

/// Kills a store that several owners write to, and looks at what is left of their work when it is back.
/// One more owner falls silent for good, and only that one's lease runs out.
///
/// # Panics
/// When the store does not keep what it promises.
pub async fn long_outage(subject: &dyn Subject, plan: OutagePlan) -> OutageReport {
    let clock = subject.clock(0);
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for number in 0..WRITERS {
        let store = subject.client(0).await;
        writers.push(Writer::start(store, number, plan.ttl, Arc::clone(&stop)).await);
    }
    let store = subject.client(0).await;
    let silent = RecordName::new("outage", "silent", "peer").expect("a good name");
    let silent = store.claim(&claim(&silent, 99, plan.ttl)).await.expect("the name is free");
    // A cache, whose follower tries to return all along.
    let cache = Layered::new(subject.client(0).await, clock.clone());
    cache.get(&silent.name).await.expect("it was claimed");
    pause(plan.before).await;
    store.renew(&silent).await.expect("its lease still runs");

    assert!(subject.kill().await, "this is about a store that can be killed");
    let door = Door::open(subject).await;
    let unavailable = ask_in_vain(&*store, &silent.name, &clock, plan.outage).await;
    let connections = door.close().await;
    let bound = connections_max(unavailable, plan.outage);
    assert!(connections <= bound, "{connections} connections, where {bound} would do");

    let returned_at = clock.now();
    subject.start().await;
    let up_for = returned(&*store, &clock).await;
    let away = clock.now().since(returned_at);
    assert!(up_for <= away + Duration::from_secs(1), "it was not up during the outage: {up_for:?}");
    for writer in &writers {
        let guard = store.get(&writer.hold.name).await.expect("the outage expired nobody");
        assert_eq!(guard.stamp().fence, writer.hold.fence);
    }
    let guard = store.get(&silent.name).await.expect("nor who has not renewed yet");
    assert_eq!(guard.stamp().fence, silent.fence);
    pause(plan.before).await;
    stop.store(true, Ordering::SeqCst);
    let mut acknowledged = 0;
    for writer in writers {
        writer.task.await.expect("no writer failed");
        let count = writer.acknowledged.load(Ordering::SeqCst);
        let guard = store.get(&writer.hold.name).await.expect("its lease runs");
        let (version, rank) = (guard.stamp().version.0, guard.unchecked().record.rank);
        assert!(version >= count, "version {count} was acknowledged, {version} is left");
        assert_eq!(rank.map(u64::from), Some(version), "the record is that of its version");
        acknowledged += count;
    }
    judged(subject, &*store, &silent, plan.ttl).await;
    OutageReport { acknowledged, unavailable, connections, up_for }
}

/// Connections that everybody together may try: askers once per question, writers once per pause that an
/// outage asks for, the cache as its backoff says, and each of them some more, because a client may try
/// again by itself.
fn connections_max(asked: u64, outage: Duration) -> u64 {
    let pauses = outage.as_secs() * 5;
    let looks = 8 + outage.as_secs() / 2;
    (asked + u64::from(WRITERS) * pauses + looks) * CONNECTIONS_PER_QUESTION
}

/// Waits until the store answers; for how long it says that it has been up.
async fn returned(store: &dyn Store, clock: &Clock) -> Duration {
    let end = clock.now().after(PATIENCE);
    loop {
        match store.health().await {
            Ok(health) => return health.up_for,
            Err(error) => assert!(error.is_transient() && clock.now() < end, "{error}"),
        }
        pause(ASK_PERIOD).await;
    }
}

/// Once the store has been up for one lease, silence is evidence again.
async fn judged(subject: &dyn Subject, store: &dyn Store, silent: &Hold, ttl: Duration) {
    let clock = subject.clock(0);
    let end = clock.now().after(PATIENCE);
    while !store.health().await.expect("the store is up").can_judge(silent.ttl + subject.lag()) {
        assert!(clock.now() < end, "the store does not get older");
        pause(ASK_PERIOD).await;
    }
    subject.pass(ttl / 8 + subject.lag()).await;
    let expired = StoreError::LeaseExpired { fence: silent.fence };
    assert_eq!(store.get(&silent.name).await, Err(expired));
}
