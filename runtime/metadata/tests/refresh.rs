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

impl Rig {
    /// One that tracks a name and has a lease on it.
    async fn settled() -> (Self, Hold) {
        let rig = Self::new();
        let hold = rig.claimed("a").await;
        rig.refresher.track(&hold.name);
        rig.until("a lease", |rig| rig.refresher.latest(&name("a")).is_some()).await;
        rig.until("a watch", |rig| rig.refresher.counters().follows == 1).await;
        rig.until("the ack", |rig| rig.refresher.is_registered(&name("a"), Stamp::default())).await;
        (rig, hold)
    }

    fn set(&self, mood: Mood) {
        *self.spy.mood.lock() = mood;
    }

    /// Lets so many failures happen, with all the pauses between them.
    async fn fail(&self, times: u64) {
        self.set(Mood::Away);
        let wanted = self.refresher.counters().failures + times;
        self.refresher.force(&name("a"));
        self.until("failures", |rig| {
            let have_failed = rig.refresher.counters().failures >= wanted;
            if !have_failed {
                // Not after the last: the pause that it began would be over before anybody looks.
                rig.clock.advance(Duration::from_millis(50));
            }
            have_failed
        })
        .await;
    }

    /// For how long the next question waits.
    fn pause(&self) -> Duration {
        match self.refresher.force(&name("a")) {
            Forced::NotBefore(at) => at.since(self.clock.now()),
            other => panic!("{other:?}"),
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

#[test]
fn what_was_granted_ends_with_its_time_and_so_does_the_owners_memory_of_a_reader() {
    run(async {
        let (rig, hold) = Rig::settled().await;
        let stamp = Stamp::new(hold.fence, Version(0));
        rig.set(Mood::Away);
        rig.clock.advance(TTL + TTL / 10);
        assert_eq!(rig.refresher.latest(&hold.name), None, "the lease ran out");
        assert!(rig.refresher.is_registered(&hold.name, stamp));
        rig.clock.advance(TTL * 100);
        assert!(!rig.refresher.is_registered(&hold.name, stamp), "the owner waits no longer");
    });
}

#[test]
fn news_is_asked_for_at_once_however_long_the_pause_was() {
    run(async {
        let rig = Rig::new();
        rig.refresher.track(&name("a"));
        rig.until("refusals", |rig| {
            rig.clock.advance(Duration::from_millis(50));
            rig.refresher.counters().refusals >= 9
        })
        .await;
        assert!(rig.pause() > Duration::from_millis(600));
        let before = rig.clock.now();
        rig.claimed("a").await;
        rig.until("the news", |rig| rig.refresher.latest(&name("a")).is_some()).await;
        assert!(rig.clock.now().since(before) < Duration::from_millis(400));
    });
}

#[test]
fn a_name_that_nobody_tracks_concerns_nobody() {
    run(async {
        let (rig, _) = Rig::settled().await;
        rig.until("rest", |rig| rig.spy.asked().is_empty()).await;
        let before = rig.told.0.lock().len();
        let (stranger, tracked) = (rig.claimed("stranger").await, rig.claimed("b").await);
        rig.publish(&stranger, 0).await;
        rig.refresher.track(&tracked.name);
        rig.until("the other", |rig| rig.refresher.latest(&name("b")).is_some()).await;
        let told = rig.told.0.lock()[before..].to_vec();
        assert!(!told.iter().any(|line| line == "seen 1"), "{told:?}");
    });
}

#[test]
fn the_end_of_an_ownership_ends_what_was_granted_before_anybody_is_asked() {
    run(async {
        let (rig, hold) = Rig::settled().await;
        rig.spy.passes.forget_permits(usize::MAX);
        rig.spy.inner.release(&hold).await.unwrap();
        rig.until("the end", |rig| rig.told.0.lock().iter().any(|line| line == "ended true")).await;
        assert_eq!(rig.refresher.latest(&hold.name), None);
    });
}

#[test]
fn an_answer_of_the_wrong_length_is_a_refusal_of_all_and_takes_what_was_granted() {
    run(async {
        let (rig, hold) = Rig::settled().await;
        rig.set(Mood::Short);
        rig.refresher.force(&hold.name);
        rig.until("the refusal", |rig| rig.refresher.counters().refusals == 1).await;
        assert_eq!(rig.refresher.latest(&hold.name), None);
        rig.set(Mood::Good);
        rig.until("the recovery", |rig| rig.refresher.latest(&name("a")).is_some()).await;
    });
}

#[test]
fn what_an_answer_retires_goes_before_what_it_grants() {
    run(async {
        let rig = Rig::new();
        let hold = rig.claimed("a").await;
        rig.publish(&hold, 0).await;
        rig.until("a watch", |rig| rig.refresher.counters().follows == 1).await;
        rig.refresher.track(&hold.name);
        rig.until("a lease", |rig| rig.refresher.latest(&name("a")).is_some()).await;
        assert_eq!(rig.told.0.lock()[..2], ["seen 1", "granted 1"]);
    });
}

#[test]
fn a_success_makes_the_next_pause_short_again_unless_the_store_says_how_long() {
    run(async {
        let (rig, hold) = Rig::settled().await;
        let until = |rig: &Rig| rig.refresher.latest(&name("a")).map(|leased| leased.valid_until());
        let before = until(&rig);
        rig.fail(8).await;
        assert!(rig.pause() > Duration::from_millis(300));
        rig.spy.inner.renew(&hold).await.unwrap();
        rig.set(Mood::Good);
        rig.until("the recovery", |rig| until(rig) > before).await;
        rig.fail(1).await;
        assert!(rig.pause() < Duration::from_millis(100));
        rig.set(Mood::Busy);
        let failures = rig.refresher.counters().failures;
        rig.until("a busy store", |rig| rig.refresher.counters().failures > failures).await;
        assert!(rig.pause() > Duration::from_millis(500));
    });
}

#[test]
fn an_owner_is_told_once_and_again_only_if_it_did_not_hear() {
    run(async {
        let (rig, hold) = Rig::settled().await;
        let acks = || rig.spy.acks.load(std::sync::atomic::Ordering::SeqCst);
        let before = acks();
        for batches in 1..=5 {
            let wanted = rig.refresher.counters().batches + 1;
            rig.refresher.force(&hold.name);
            rig.until("a batch", |rig| rig.refresher.counters().batches >= wanted).await;
            assert_eq!(acks(), before, "after {batches} batches");
        }
        rig.set(Mood::Deaf);
        rig.publish(&hold, 0).await;
        rig.until("words that are lost", |_| acks() > before + 1).await;
        let stamp = Stamp::new(hold.fence, Version(1));
        assert!(!rig.refresher.is_registered(&hold.name, stamp));
        rig.set(Mood::Good);
        let since = rig.clock.now();
        rig.until("the ack", |rig| rig.refresher.is_registered(&name("a"), stamp)).await;
        assert!(rig.clock.now().since(since) < TTL / 4, "the next renewal is later than that");
    });
}

#[test]
fn who_follows_returns_with_pauses_and_asks_for_what_changed_meanwhile() {
    run(async {
        let (rig, hold) = Rig::settled().await;
        rig.set(Mood::Away);
        rig.spy.cut.notify_waiters();
        let before = rig.refresher.counters().follows;
        for _ in 0..200 {
            rig.clock.advance(Duration::from_millis(2));
            for _ in 0..8 {
                tokio::task::yield_now().await;
            }
        }
        let follows = rig.refresher.counters().follows - before;
        assert!((1..=12).contains(&follows), "{follows} attempts in 400 ms");
        rig.publish(&hold, 0).await;
        rig.set(Mood::Good);
        let since = rig.clock.now();
        rig.until("the change", |rig| {
            rig.refresher.latest(&name("a")).is_some_and(|leased| leased.stamp().version == Version(1))
        })
        .await;
        assert!(rig.clock.now().since(since) < TTL / 4, "the next renewal is later than that");
    });
}
