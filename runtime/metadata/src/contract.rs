//! What every backend promises, as one suite: the same cases, the same errors.
//!
//! A backend's test implements [`Subject`] and calls [`run`]. Each case works under a cluster of its
//! own name, so that cases do not meet in a shared store. A case fails by panicking, with its name
//! printed before it by the test that runs it.

mod batches;
#[cfg(feature = "layered")]
mod cached;
mod cells;
mod claims;
mod leases;
#[cfg(feature = "layered")]
mod long_outage;
mod outages;
mod publishing;
pub mod samples;
mod watches;

use core::time::Duration;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::task::JoinSet;

#[cfg(feature = "layered")]
pub use self::cached::Cached;
#[cfg(feature = "layered")]
pub use self::long_outage::{OutagePlan, OutageReport, long_outage};
use crate::clock::Clock;
use crate::ids::{InstanceId, Version};
use crate::name::RecordName;
use crate::record::{PeerRecord, RecordState};
use crate::store::{Claim, Hold, Store};

/// Clocks of clients are wrong by as much as this, in both directions.
pub const SKEW_NS: i64 = 600 * 1_000_000_000;

/// A store under test.
#[async_trait]
pub trait Subject: Send + Sync {
    /// A client with a clock of its own: the store's, shifted.
    async fn client(&self, skew_ns: i64) -> Arc<dyn Store>;

    /// The clock of the client with this shift.
    fn clock(&self, skew_ns: i64) -> Clock;

    /// The lease that cases let run out. Long enough that a slow machine does not lose it by accident.
    fn short_ttl(&self) -> Duration;

    /// How late the store may notice that a lease ran out: until then its owner may still write.
    fn lag(&self) -> Duration {
        Duration::ZERO
    }

    /// Where the store listens, if on TCP.
    fn address(&self) -> Option<SocketAddr> {
        None
    }

    /// Whether a client may go on saying what it knows, within its lease, while the store is away.
    fn serves_what_it_knows(&self) -> bool {
        false
    }

    /// Lets time pass for the store and for all clients.
    async fn pass(&self, duration: Duration);

    /// Kills the store, if there is a way to; `false`: there is none, and nothing happened.
    async fn kill(&self) -> bool {
        false
    }

    /// Starts the killed store again, on what it had written.
    async fn start(&self) {}
}

/// One case's surroundings.
pub struct Case<'a> {
    /// The store under test.
    pub subject: &'a dyn Subject,
    /// A client with the right clock.
    pub store: Arc<dyn Store>,
    cluster: String,
}

/// A lease that no case lets run out by accident.
const LONG: Duration = Duration::from_secs(3600);

impl Case<'_> {
    fn name(&self, name: &str) -> RecordName {
        RecordName::new(&self.cluster, "group", name).expect("cases use good names")
    }

    async fn claim_as(&self, name: &RecordName, instance: u128, ttl: Duration) -> Hold {
        self.store.claim(&claim(name, instance, ttl)).await.expect("the name is free")
    }

    async fn claimed(&self, name: &str) -> Hold {
        self.claim_as(&self.name(name), 1, LONG).await
    }

    async fn published(&self, name: &str) -> Hold {
        let hold = self.claimed(name).await;
        let version = self.store.publish(&hold, Version(0), &ready(&hold)).await;
        assert_eq!(version, Ok(Version(1)));
        hold
    }

    async fn let_expire(&self, ttl: Duration) {
        self.subject.pass(ttl + ttl / 8 + self.subject.lag()).await;
    }
}

fn instance(number: u128) -> InstanceId {
    InstanceId::new(number).expect("cases count from 1")
}

fn claim(name: &RecordName, owner: u128, ttl: Duration) -> Claim {
    Claim { name: name.clone(), instance: instance(owner), ttl, takeover: false }
}

fn ready(hold: &Hold) -> PeerRecord {
    let identity = crate::record::Identity::Instance(hold.instance);
    PeerRecord { state: RecordState::Ready, ..PeerRecord::empty(&hold.name, identity) }
}

type CaseFuture<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

macro_rules! cases {
    ($($room:ident: $($name:ident)*;)*) => {
        /// The names of all cases.
        pub const CASES: &[&str] = &[$($(stringify!($name),)*)*];

        fn case<'a>(name: &str, case: &'a Case<'a>) -> CaseFuture<'a> {
            match name {
                $($(stringify!($name) => Box::pin($room::$name(case)),)*)*
                other => {
                    assert!(CASES.contains(&other), "no case is called {other}");
                    Box::pin(async {})
                }
            }
        }
    };
}

cases! {
    claims:
        a_free_name_is_claimed_with_an_empty_record
        one_of_many_claims_wins
        a_held_name_is_refused_with_what_remains
        takeover_fences_the_owner_out
        a_repeated_claim_gives_the_same_hold
        a_crashed_owner_claims_again_and_starts_empty
        fences_grow_over_release_and_expiry
        a_hold_is_good_for_its_owner_alone
        readers_stay_registered_over_a_takeover
        lease_lengths_are_bounded;
    publishing:
        versions_follow_one_another
        one_of_many_publishers_wins_each_version
        extreme_fences_and_versions_are_compared_exactly
        a_name_that_was_never_claimed_is_not_found
        a_record_for_somebody_else_is_refused
        sizes_are_bounded_and_nothing_is_lost
        every_variant_comes_back_identical
        legacy_records_come_back_as_they_were_read;
    leases:
        a_lease_runs_out_unless_renewed
        a_renewed_lease_goes_on
        a_released_name_is_gone_and_free
        skewed_clients_see_the_same_leases
        guards_run_out_on_the_readers_clock
        stale_records_are_listed_not_hidden;
    batches:
        outcomes_keep_order_and_length
        batches_are_bounded
        pages_show_each_name_once_in_order
        prefixes_compare_whole_parts
        readers_are_registered_until_they_fall_silent
        a_readers_stamp_never_goes_back;
    watches:
        a_watch_sees_every_change_in_order
        a_watch_resumes_without_loss
        a_watch_from_nowhere_gets_a_gap
        a_watch_sees_only_its_prefix
        a_listing_and_a_watch_from_it_miss_nothing;
    cells:
        a_cell_is_changed_by_compare_and_set_alone
        one_of_many_swaps_wins
        cells_are_bounded;
    outages:
        health_counts_names_and_revisions
        an_outage_is_unavailable_never_empty
        a_restart_loses_nothing_and_expires_nobody;
}

/// Runs one case against a subject of its own.
async fn run_one<S: Subject>(name: &str, subject: S) {
    let store = subject.client(0).await;
    let cluster = name.chars().take(crate::limits::NAME_PART_LEN_MAX).collect();
    case(name, &Case { subject: &subject, store, cluster }).await;
}

/// Runs the cases whose names contain `only`, each against a subject of its own, which `fresh` makes.
/// `starting` is told each name first, so that a failure has one.
pub async fn run<S, F>(only: &str, starting: impl Fn(&str), fresh: impl Fn() -> F)
where
    S: Subject,
    F: Future<Output = S>,
{
    for name in CASES.iter().filter(|name| name.contains(only)) {
        starting(name);
        run_one(name, fresh().await).await;
    }
}

/// Runs all cases, some at a time: for stores whose leases run out in real time.
///
/// # Panics
/// When a case fails, with its name.
pub async fn run_at_once<S, F>(at_once: usize, fresh: impl Fn() -> F)
where
    S: Subject + 'static,
    F: Future<Output = S>,
{
    let mut names = CASES.iter();
    let mut running = JoinSet::new();
    loop {
        while running.len() < at_once
            && let Some(name) = names.next()
        {
            let subject = fresh().await;
            running.spawn(async move {
                // In a task of its own, so that a failure finds its name here.
                (name, tokio::spawn(run_one(name, subject)).await)
            });
        }
        let Some(ended) = running.join_next().await else { return };
        let (name, result) = ended.expect("the task only waits");
        assert!(result.is_ok(), "case {name}: {result:?}");
    }
}
