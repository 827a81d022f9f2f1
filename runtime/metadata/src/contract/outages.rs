//! Stores go away and come back.

use core::time::Duration;
use std::sync::Arc;

use super::{Case, instance, ready};
use crate::error::{Result, StoreError};
use crate::ids::{Stamp, Version};
use crate::lease::Leased;
use crate::name::Prefix;
use crate::store::{Ack, Cell, Filter, Snapshot};

pub(super) async fn health_counts_names_and_revisions(case: &Case<'_>) {
    let before = case.store.health().await.expect("the store is up");
    let hold = case.published("a").await;
    let after = case.store.health().await.expect("the store is up");
    assert!(after.revision.0 >= before.revision.0 + 2);
    assert_eq!(after.num_names, before.num_names + 1);
    assert!(after.up_for >= before.up_for);
    case.store.release(&hold).await.expect("it is held");
    let gone = case.store.health().await.expect("the store is up");
    assert_eq!(gone.num_names, before.num_names);
    assert!(gone.can_judge(gone.up_for) && !gone.can_judge(Duration::MAX));
}

pub(super) async fn an_outage_is_unavailable_never_empty(case: &Case<'_>) {
    let hold = case.published("a").await;
    if !case.subject.kill().await {
        return;
    }
    let is_outage = |error: &StoreError| error.is_transient();
    let listed = case.store.list(&Filter::under(Prefix::all())).await;
    assert!(listed.as_ref().is_err_and(is_outage), "{listed:?}");
    let is_known = |guard: &Leased<Arc<Snapshot>>| {
        case.subject.serves_what_it_knows() && guard.unchecked().record == ready(&hold)
    };
    let read = case.store.get(&hold.name).await;
    assert!(read.as_ref().map_or_else(is_outage, is_known), "{read:?}");
    let batch = case.store.batch_get(std::slice::from_ref(&hold.name)).await;
    let is_good = |read: &Vec<Result<_>>| read.iter().all(|read| read.as_ref().is_ok_and(is_known));
    assert!(batch.as_ref().map_or_else(is_outage, is_good), "{batch:?}");
    let published = case.store.publish(&hold, Version(1), &ready(&hold)).await;
    assert!(published.as_ref().is_err_and(is_outage), "{published:?}");
    let renewed = case.store.renew(&hold).await;
    assert!(renewed.as_ref().is_err_and(is_outage), "{renewed:?}");
    let health = case.store.health().await;
    assert!(health.as_ref().is_err_and(is_outage), "{health:?}");
    case.subject.start().await;
}

pub(super) async fn a_restart_loses_nothing_and_expires_nobody(case: &Case<'_>) {
    let (ttl, cell) = (case.subject.short_ttl(), case.name("view"));
    let hold = case.claim_as(&case.name("a"), 1, ttl).await;
    let published = case.store.publish(&hold, Version(0), &ready(&hold)).await;
    assert_eq!(published, Ok(Version(1)));
    let released = case.published("released").await;
    case.store.release(&released).await.expect("it is held");
    case.store.swap_cell(&cell, Version(0), b"view").await.expect("the cell is free");
    let stamp = Stamp::new(hold.fence, Version(1));
    let ack = Ack { name: hold.name.clone(), reader: instance(7), stamp, ttl };
    case.store.ack(&ack).await.expect("the name exists");
    let before = case.store.health().await.expect("the store is up").revision;
    if !case.subject.kill().await {
        return;
    }
    case.subject.pass(ttl * 4).await;
    case.subject.start().await;
    let guard = case.store.get(&hold.name).await.expect("the outage expired nobody");
    assert_eq!((guard.stamp(), &guard.unchecked().record), (stamp, &ready(&hold)));
    assert_eq!(case.store.renew(&hold).await, Ok(()), "the owner goes on with the hold it has");
    let readers = case.store.readers(&hold.name).await.expect("the name exists");
    assert_eq!(readers.iter().map(|reader| reader.reader).collect::<Vec<_>>(), [instance(7)]);
    let view = Cell { version: Version(1), value: b"view".into() };
    assert_eq!(case.store.read_cell(&cell).await, Ok(view));
    assert_eq!(case.store.get(&released.name).await, Err(StoreError::NotFound));
    let again = case.claim_as(&released.name, 2, ttl).await;
    assert!(again.fence > released.fence && again.fence > hold.fence);
    let health = case.store.health().await.expect("the store is up");
    assert!(health.revision > before);
    assert!(!health.can_judge(Duration::from_secs(3600)), "it has not been up for that long");
}
