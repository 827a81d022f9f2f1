//! What views of other systems' protocols share: they read and write the records of the same store.
//!
//! The clients of a view know no claim, no fence and no lease. The view holds their names for them: its
//! instance id is made from the name, so that every server in front of one store is the same holder and a
//! restart locks nobody out. What it publishes says [`Identity::Legacy`](crate::record::Identity::Legacy):
//! no process id is made up for the peer itself.
//!
//! INVARIANT: a view keeps nothing of its own; whatever it answers was in the store a moment before.

pub(super) mod parcel;

use core::time::Duration;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::error::{Corruption, Result, StoreError};
use crate::ids::{InstanceId, Version};
use crate::limits::PAGE_LEN_MAX;
use crate::name::{Prefix, RecordName};
use crate::record::PeerRecord;
use crate::store::{Claim, Filter, Hold, Listed, Snapshot, Store};

/// How often a change is tried anew because another one came in between.
const ATTEMPTS: usize = 8;
/// Length of the first page where few entries are expected.
const FEW: usize = 4;

/// What a name holds now, also if its lease ran out; `None` if nobody owns it or nothing was published.
pub(super) async fn look(store: &dyn Store, name: &RecordName) -> Result<Option<Listed>> {
    let filter = Filter { limit: 1, ..Filter::under(Prefix::from(name)) };
    let page = store.list(&filter).await?;
    Ok(page.entries.into_iter().next().filter(|entry| entry.snapshot.stamp.version > Version(0)))
}

/// Claims a name for whom the view speaks for; who holds it already gets its lease anew.
pub(super) async fn hold(store: &dyn Store, name: &RecordName, ttl: Duration) -> Result<Hold> {
    let digest = Sha256::digest(format!("ibex view of {name}"));
    let (head, _) = digest.split_first_chunk().ok_or(StoreError::Corrupt(Corruption::Row))?;
    let instance = InstanceId::from_bytes(*head).ok_or(StoreError::Corrupt(Corruption::Row))?;
    store.claim(&Claim { name: name.clone(), instance, ttl, takeover: false }).await
}

/// Publishes what `change` makes of the present record, and answers what was there before. A record that
/// stays as it is only gets its lease anew: signs of life rewrite nothing.
pub(super) async fn change(
    store: &dyn Store,
    name: &RecordName,
    ttl: Duration,
    change: impl Fn(Option<&Snapshot>) -> Result<PeerRecord>,
) -> Result<Option<Arc<Snapshot>>> {
    let mut conflict = StoreError::Conflict { current: Version(0) };
    for _ in 0..ATTEMPTS {
        let before = look(store, name).await?.map(|entry| entry.snapshot);
        let record = change(before.as_deref())?;
        let hold = hold(store, name, ttl).await?;
        // Under a new fence the record starts empty, and what was there is published again.
        let current = before.as_ref().filter(|before| before.stamp.fence == hold.fence);
        if current.is_some_and(|current| current.record == record) {
            return Ok(before);
        }
        let expect = current.map_or(Version(0), |current| current.stamp.version);
        match store.publish(&hold, expect, &record).await {
            Ok(_) => return Ok(before),
            Err(error @ (StoreError::Conflict { .. } | StoreError::Fenced { .. })) => conflict = error,
            Err(error) => return Err(error),
        }
    }
    Err(conflict)
}

/// Every record that somebody published, in order of names, a page at a time.
pub(super) async fn for_each(store: &dyn Store, mut see: impl FnMut(Listed)) -> Result<()> {
    let mut filter = Filter::under(Prefix::all());
    loop {
        let page = store.list(&filter).await?;
        let published = page.entries.into_iter().filter(|entry| entry.snapshot.stamp.version > Version(0));
        published.for_each(&mut see);
        filter.after = page.next;
        if filter.after.is_none() {
            return Ok(());
        }
    }
}

/// The same for those names of a group that begin with `start`.
pub(super) async fn for_each_like(
    store: &dyn Store,
    start: &RecordName,
    mut see: impl FnMut(Listed),
) -> Result<()> {
    let (cluster, group, _) = start.parts();
    let group = Prefix::parse(&format!("{cluster}/{group}"))?;
    // Few are expected, and what follows them is somebody else's.
    let mut filter = Filter { after: Some(start.clone()), limit: FEW, ..Filter::under(group) };
    loop {
        let page = store.list(&filter).await?;
        for entry in page.entries {
            if !entry.snapshot.name.as_str().starts_with(start.as_str()) {
                return Ok(());
            }
            if entry.snapshot.stamp.version > Version(0) {
                see(entry);
            }
        }
        filter.after = page.next;
        if filter.after.is_none() {
            return Ok(());
        }
        filter.limit = PAGE_LEN_MAX;
    }
}
