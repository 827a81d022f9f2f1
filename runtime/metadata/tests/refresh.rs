//! Refreshing off the data path: who is told, how often the store is asked, and what a failure costs.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use ibex_metadata::clock::Clock;
use ibex_metadata::ids::{Fence, InstanceId, Stamp, Version};
use ibex_metadata::lease::Leased;
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::record::PeerRecord;
use ibex_metadata::refresh::{Forced, Observer, Reader, Refresher};
use ibex_metadata::store::{Claim, Hold, Snapshot, Store};
use parking_lot::Mutex;
use spy::{Mood, Spy};

mod spy;

const TTL: Duration = Duration::from_secs(10);
/// Nothing here takes seconds; a busy machine may.
const PATIENCE: Duration = Duration::from_secs(20);

/// Writes down what it is told.
#[derive(Debug, Default)]
struct Told(Mutex<Vec<String>>);

impl Observer for Told {
    fn seen(&self, snapshot: &Arc<Snapshot>) {
        self.0.lock().push(format!("seen {}", snapshot.stamp.version));
    }
    fn granted(&self, leased: &Leased<Arc<Snapshot>>) {
        self.0.lock().push(format!("granted {}", leased.stamp().version));
    }
    fn ended(&self, _name: &RecordName, _fence: Fence, released: bool) {
        self.0.lock().push(format!("ended {released}"));
    }
}

struct Rig {
    clock: Clock,
    spy: Arc<Spy>,
    told: Arc<Told>,
    refresher: Refresher,
}

fn name(text: &str) -> RecordName {
    RecordName::new("c", "g", text).unwrap()
}

impl Rig {
    fn new() -> Self {
        let clock = Clock::manual();
        let spy = Arc::new(Spy::new(LocalStore::memory(clock.clone())));
        let (store, told) = (spy.clone() as Arc<dyn Store>, Arc::new(Told::default()));
        let reader = Reader { instance: InstanceId::new(9).unwrap(), ttl: TTL * 100 };
        let refresher = Refresher::spawn(&store, &clock, Prefix::all(), told.clone(), Some(reader));
        Self { clock, spy, told, refresher }
    }

    async fn claimed(&self, text: &str) -> Hold {
        let instance = InstanceId::new(1).unwrap();
        let claim = Claim { name: name(text), instance, ttl: TTL, takeover: false };
        self.spy.inner.claim(&claim).await.unwrap()
    }

    async fn publish(&self, hold: &Hold, version: u64) {
        let identity = ibex_metadata::record::Identity::Instance(hold.instance);
        let record = PeerRecord { rank: Some(7), ..PeerRecord::empty(&hold.name, identity) };
        self.spy.inner.publish(hold, Version(version), &record).await.unwrap();
    }

    /// Lets the tasks run; time passes a little, so that pauses end.
    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !holds(self) {
            assert!(started.elapsed() < PATIENCE, "{what} did not happen: {:?}", self.told.0.lock());
            self.clock.advance(Duration::from_millis(1));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

#[test]
fn a_change_is_told_at_once_and_then_leased_and_the_owner_knows_who_reads() {
    run(async {
        let rig = Rig::new();
        let hold = rig.claimed("a").await;
        rig.refresher.track(&hold.name);
        rig.until("a lease", |rig| rig.refresher.latest(&name("a")).is_some()).await;
        rig.until("a watch", |rig| rig.refresher.counters().follows == 1).await;
        rig.publish(&hold, 0).await;
        let stamp = Stamp::new(hold.fence, Version(1));
        rig.until("the ack", |rig| rig.refresher.is_registered(&name("a"), stamp)).await;
        let told = rig.told.0.lock().clone();
        let at = |what: &str| told.iter().position(|line| line == what);
        assert!(at("seen 1").unwrap() < at("granted 1").unwrap(), "{told:?}");
        assert_eq!(rig.spy.inner.readers(&hold.name).await.unwrap()[0].stamp, stamp);
        rig.spy.inner.release(&hold).await.unwrap();
        rig.until("the end", |rig| rig.told.0.lock().iter().any(|line| line == "ended true")).await;
        assert_eq!(rig.refresher.latest(&name("a")), None);
    });
}

#[test]
fn many_wishes_are_one_question_at_a_time() {
    run(async {
        let rig = Rig::new();
        let hold = rig.claimed("a").await;
        rig.refresher.track(&hold.name);
        rig.until("a lease", |rig| rig.refresher.latest(&name("a")).is_some()).await;
        rig.until("rest", |rig| rig.spy.asked().is_empty()).await;
        rig.spy.passes.forget_permits(usize::MAX);
        rig.refresher.force(&hold.name);
        rig.until("a question", |rig| rig.refresher.force(&name("a")) == Forced::InFlight).await;
        for _ in 0..100 {
            assert_eq!(rig.refresher.force(&hold.name), Forced::InFlight);
            tokio::task::yield_now().await;
        }
        assert_eq!(rig.spy.asked().len(), 1, "the others wait for this one's answer");
        rig.spy.passes.add_permits(1 << 20);
        assert_eq!(rig.refresher.force(&name("stranger")), Forced::Untracked);
    });
}

#[test]
fn a_lease_is_renewed_when_half_of_it_is_over() {
    run(async {
        let rig = Rig::new();
        let hold = rig.claimed("a").await;
        rig.refresher.track(&hold.name);
        rig.until("a lease", |rig| rig.refresher.latest(&name("a")).is_some()).await;
        let first = rig.refresher.latest(&hold.name).unwrap().valid_until();
        rig.clock.advance(TTL / 2);
        rig.spy.inner.renew(&hold).await.unwrap();
        rig.until("another lease", |rig| {
            rig.refresher.latest(&name("a")).is_some_and(|leased| leased.valid_until() > first)
        })
        .await;
    });
}

#[test]
fn absence_and_outage_are_asked_for_ever_more_rarely_until_there_is_news() {
    run(async {
        let rig = Rig::new();
        rig.refresher.track(&name("a"));
        rig.until("refusals", |rig| rig.refresher.counters().refusals >= 4).await;
        assert!(matches!(rig.refresher.force(&name("a")), Forced::NotBefore(_)));
        let before = rig.refresher.counters().batches;
        for _ in 0..200 {
            rig.refresher.force(&name("a"));
            rig.clock.advance(Duration::from_millis(10));
            tokio::task::yield_now().await;
        }
        let asked = rig.refresher.counters().batches - before;
        assert!((1..=20).contains(&asked), "{asked} questions in two seconds");
        let hold = rig.claimed("a").await;
        rig.until("the news", |rig| rig.refresher.latest(&name("a")).is_some()).await;
        *rig.spy.mood.lock() = Mood::Away;
        rig.refresher.force(&hold.name);
        rig.until("a failure", |rig| rig.refresher.counters().failures > 0).await;
        assert!(rig.refresher.latest(&hold.name).is_some(), "an outage is no answer");
    });
}
