//! Following changes.

use std::collections::BTreeSet;

use super::{Case, LONG, ready};
use crate::ids::{Revision, Version};
use crate::name::Prefix;
use crate::store::{Change, Event, Filter, Watch};

/// A change without the payload that other cases compare.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Put(u64, u64),
    Expired(u64),
    Released(u64),
    Cell(u64),
    Gap,
}

fn seen(event: &Event) -> Seen {
    match &event.change {
        Change::Put(snapshot) => Seen::Put(snapshot.stamp.fence.0, snapshot.stamp.version.0),
        Change::Expired { fence, .. } => Seen::Expired(fence.0),
        Change::Released { fence, .. } => Seen::Released(fence.0),
        Change::Cell { version, .. } => Seen::Cell(version.0),
        Change::Gap => Seen::Gap,
    }
}

impl Case<'_> {
    fn prefix(&self) -> Prefix {
        Prefix::parse(&self.cluster).expect("a good prefix")
    }

    async fn watch_from_now(&self) -> Watch {
        let revision = self.store.health().await.expect("the store is up").revision;
        self.store.watch(&self.prefix(), revision).await.expect("a watch begins")
    }
}

pub(super) async fn a_watch_sees_every_change_in_order(case: &Case<'_>) {
    let mut watch = case.watch_from_now().await;
    let ttl = case.subject.short_ttl();
    let first = case.published("a").await;
    case.store.release(&first).await.expect("it is held");
    let second = case.claim_as(&first.name, 2, ttl).await;
    case.store.swap_cell(&case.name("cell"), Version(0), b"x").await.expect("the cell is free");
    let mut events = Vec::new();
    for _ in 0..5 {
        events.push(watch.next().await.expect("the watch goes on"));
    }
    case.let_expire(ttl).await;
    events.push(watch.next().await.expect("the watch goes on"));
    let (one, two) = (first.fence.0, second.fence.0);
    assert_eq!(
        events.iter().map(seen).collect::<Vec<_>>(),
        [
            Seen::Put(one, 0),
            Seen::Put(one, 1),
            Seen::Released(one),
            Seen::Put(two, 0),
            Seen::Cell(1),
            Seen::Expired(two),
        ]
    );
    assert!(events.windows(2).all(|pair| pair[0].revision < pair[1].revision), "revisions grow");
    let put = |event: &Event| matches!(&event.change, Change::Put(s) if s.record == ready(&first));
    assert!(put(&events[1]), "the event carries the record");
}

pub(super) async fn a_watch_resumes_without_loss(case: &Case<'_>) {
    let mut watch = case.watch_from_now().await;
    let hold = case.published("a").await;
    let claimed = watch.next().await.expect("the watch goes on");
    drop(watch);
    let published = case.store.publish(&hold, Version(1), &ready(&hold)).await;
    assert_eq!(published, Ok(Version(2)));
    let mut watch = case.store.watch(&case.prefix(), claimed.revision).await.expect("a watch resumes");
    for version in [1, 2] {
        let event = watch.next().await.expect("the watch goes on");
        assert_eq!(seen(&event), Seen::Put(hold.fence.0, version));
    }
}

pub(super) async fn a_watch_from_nowhere_gets_a_gap(case: &Case<'_>) {
    let hold = case.published("a").await;
    let mut watch =
        case.store.watch(&case.prefix(), Revision(u64::MAX)).await.expect("a watch begins anyway");
    let gap = watch.next().await.expect("the watch goes on");
    assert_eq!(seen(&gap), Seen::Gap);
    // It goes on from there: what the listing after the gap does not show yet, comes.
    let published = case.store.publish(&hold, Version(1), &ready(&hold)).await;
    assert_eq!(published, Ok(Version(2)));
    let event = watch.next().await.expect("the watch goes on");
    assert_eq!(seen(&event), Seen::Put(hold.fence.0, 2));
    assert!(event.revision > gap.revision);
}

pub(super) async fn a_watch_sees_only_its_prefix(case: &Case<'_>) {
    let revision = case.store.health().await.expect("the store is up").revision;
    let mine = Prefix::from(&case.name("rank-1"));
    let mut watch = case.store.watch(&mine, revision).await.expect("a watch begins");
    case.claimed("rank-10").await;
    case.claimed("rank").await;
    let hold = case.claimed("rank-1").await;
    let event = watch.next().await.expect("the watch goes on");
    assert_eq!(event.change.name(), Some(&hold.name));
}

pub(super) async fn a_listing_and_a_watch_from_it_miss_nothing(case: &Case<'_>) {
    for i in 0..3 {
        case.claim_as(&case.name(&format!("before-{i}")), 1, LONG).await;
    }
    let page = case.store.list(&Filter::under(case.prefix())).await.expect("listing works");
    let mut known: BTreeSet<_> = page.entries.iter().map(|entry| entry.snapshot.name.clone()).collect();
    for i in 0..3 {
        case.claim_as(&case.name(&format!("after-{i}")), 1, LONG).await;
    }
    let mut watch = case.store.watch(&case.prefix(), page.revision).await.expect("a watch begins");
    while known.len() < 6 {
        let event = watch.next().await.expect("the watch goes on");
        known.extend(event.change.name().cloned());
    }
}
