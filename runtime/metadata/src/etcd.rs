//! `etcd://`: records in etcd, by its own leases, transactions and watches.
//!
//! Owns one connection that all operations share. Every write is one transaction that compares what it
//! stands on, so only one of several writers wins; the reason of a refusal is found in what the same
//! transaction read. Fences and revisions are etcd's revisions, versions are etcd's versions of keys:
//! see `etcd/rows.rs`. The client is ours, on protos that are compiled beforehand: no protoc is needed.
//!
//! Leases are counted by etcd, in whole seconds, and never shorter than its election allows (2 s by
//! default): [`Hold::ttl`] says what was granted. A server that was away starts them anew. etcd notices the
//! end of a lease up to a second late; until then the owner may still write, and nobody else may claim.

#[rustfmt::skip]
#[expect(unreachable_pub, reason = "made from proto/etcd.proto")]
mod generated;
mod link;
mod rows;
mod watch;

use core::time::Duration;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::task::JoinSet;

use self::link::{Answered, Link};
pub use self::link::{EtcdConnect, Login};
use self::rows::{CELLS, CORRUPT, HELD, Life, Part, Row, Txn, UP};
use self::watch::EtcdWatch;
use crate::channel::RETRY;
use crate::clock::{Clock, within};
use crate::error::{Bounded, Result, StoreError};
use crate::ids::{Fence, LeaseId, Revision, Version};
use crate::lease::Leased;
use crate::limits::{CELL_LEN_MAX, NAMES_MAX, READERS_MAX};
use crate::name::{Prefix, RecordName};
use crate::record::PeerRecord;
use crate::store::{
    Ack, Cell, Claim, Filter, Health, Hold, Listed, Page, ReaderState, Snapshot, Store, Watch, check_batch,
    check_count, check_page, check_ttl,
};
use crate::table::rules::check_owner;

/// Names per transaction; etcd takes 128 operations unless told otherwise.
const NAMES_PER_TXN: usize = 64;
/// Leases that are asked about at a time.
const LEASES_AT_ONCE: usize = 64;
/// How often a write that lost against another one looks again before it gives up.
const TRIES_MAX: usize = 16;
/// The length, in seconds, of the lease whose age is the store's: ten years.
const UP_TTL: i64 = 10 * 365 * 24 * 3600;

/// A store in etcd.
#[derive(Clone)]
pub struct EtcdStore {
    link: Arc<Link>,
    clock: Clock,
    budget: Duration,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EtcdStore")
    }
}

impl EtcdStore {
    /// A client. Nothing is sent yet; must be called inside tokio.
    ///
    /// # Errors
    /// [`StoreError::Input`] for an address or a certificate that cannot be used.
    pub fn new(connect: &EtcdConnect, clock: Clock) -> Result<Self> {
        Ok(Self { link: Arc::new(Link::new(connect)?), clock, budget: connect.budget })
    }

    /// Reads one name.
    async fn row(&self, name: &RecordName) -> Result<Row> {
        let mut answered = self.link.txn(&Txn::read([rows::of_name(name)])).await?;
        Row::parse(answered.ranges.pop().ok_or(CORRUPT)?)
    }

    /// Reads many names, in order.
    async fn rows(&self, names: &[RecordName]) -> Result<Vec<Row>> {
        let mut found = Vec::with_capacity(names.len());
        for names in names.chunks(NAMES_PER_TXN) {
            let answered = self.link.txn(&Txn::read(names.iter().map(rows::of_name))).await?;
            if answered.ranges.len() != names.len() {
                return Err(CORRUPT);
            }
            for range in answered.ranges {
                found.push(Row::parse(range)?);
            }
        }
        Ok(found)
    }

    /// What is left of leases; those that are gone are left out. Rounded down to whole seconds.
    async fn left(&self, leases: BTreeSet<LeaseId>) -> Result<HashMap<LeaseId, Duration>> {
        let mut left = HashMap::new();
        let mut asked = JoinSet::new();
        let mut leases = leases.into_iter();
        loop {
            for lease in leases.by_ref().take(LEASES_AT_ONCE - asked.len()) {
                let link = Arc::clone(&self.link);
                asked.spawn(async move { (lease, link.time_to_live(rows::signed(lease.0)).await) });
            }
            let Some(answer) = asked.join_next().await else { return Ok(left) };
            // The runtime is shutting down.
            let (lease, answer) = answer.map_err(|_| lost())?;
            if let Some((seconds, _)) = answer? {
                left.insert(lease, secs(seconds));
            }
        }
    }

    /// One attempt at a claim; `None` if another change came between.
    async fn claim_once(&self, claim: &Claim) -> Result<Option<Hold>> {
        let reads = Txn::read([rows::of_name(&claim.name), rows::count(HELD)]);
        let [row, held] = two(self.link.txn(&reads).await?)?;
        let row = Row::parse(row)?;
        if row.life() == Life::Alive {
            let owner = row.owner()?;
            let lease = rows::signed(owner.lease.0);
            if owner.instance == claim.instance {
                if let Some(ttl) = self.link.keep_alive(lease).await? {
                    return Ok(Some(hold(claim, owner.fence, owner.lease, ttl)));
                }
            } else if !claim.takeover
                && let Some((left, _)) = self.link.time_to_live(lease).await?
            {
                return Err(StoreError::Held { fence: owner.fence, remaining: secs(left.max(1)) });
            }
        }
        if row.owner().is_err() {
            let names = usize::try_from(held.count).unwrap_or(usize::MAX);
            check_count(Bounded::Names, names.saturating_add(1), NAMES_MAX)?;
        }
        let (lease, ttl) = self.link.grant(seconds(claim.ttl)).await?;
        let id = LeaseId(rows::unsigned(lease)?);
        let (owner, life) = row.seen();
        let name = &claim.name;
        let txn = Txn::default()
            .if_changed_at(Part::Owner.key(name), owner)
            .if_changed_at(Part::Life.key(name), life)
            .put(Part::Owner.key(name), rows::owner_value(claim.instance, id), 0)
            .put(Part::Life.key(name), Vec::new(), lease)
            .put(rows::index_key(HELD, name), Vec::new(), 0)
            .delete(Part::Record.key(name))
            .or_read(rows::of_name(name));
        let answered = self.link.txn(&txn).await?;
        if !answered.succeeded {
            self.link.revoke(lease).await;
            return Ok(None);
        }
        let fence = Fence(rows::unsigned(answered.revision)?);
        Ok(Some(hold(claim, fence, id, ttl)))
    }

    async fn publish_once(&self, hold: &Hold, expect: Version, encoded: &[u8]) -> Result<Version> {
        let record = Part::Record.key(&hold.name);
        let txn = Txn::default()
            .if_held(hold)
            .if_version(record.clone(), rows::signed(expect.0))
            .put(record, rows::record_value(hold, encoded), 0)
            .or_read(rows::of_name(&hold.name));
        let answered = self.link.txn(&txn).await?;
        if answered.succeeded {
            return expect.next().ok_or(CORRUPT);
        }
        let row = refused(answered)?;
        row.check_hold(hold)?;
        Err(StoreError::Conflict { current: row.stamp()?.version })
    }

    async fn release_once(&self, hold: &Hold) -> Result<()> {
        let name = &hold.name;
        let txn = Txn::default()
            .if_held(hold)
            .put(Part::Life.key(name), rows::released_value(hold.fence), 0)
            .delete(Part::Record.key(name))
            .delete(rows::index_key(HELD, name))
            .or_read(rows::of_name(name));
        let answered = self.link.txn(&txn).await?;
        if answered.succeeded {
            self.link.revoke(rows::signed(hold.lease.0)).await;
            return Ok(());
        }
        refused(answered)?.check_hold(hold)?;
        Err(CORRUPT)
    }

    /// One attempt at registering a reader; `false` if another change came between.
    async fn ack_once(&self, ack: &Ack) -> Result<bool> {
        let key = rows::reader_key(&ack.name, ack.reader);
        let reads = [rows::of_name(&ack.name), rows::one(key.clone()), rows::readers(&ack.name)];
        let mut ranges = self.link.txn(&Txn::read(reads)).await?.ranges.into_iter();
        let mut next = || ranges.next().ok_or(CORRUPT);
        let (row, before, readers) = (Row::parse(next()?)?, next()?.kvs.pop(), next()?);
        let current = row.stamp()?;
        if row.life() == Life::Released {
            return Err(StoreError::NotFound);
        }
        if ack.stamp > current {
            return Err(StoreError::Conflict { current: current.version });
        }
        let (mut stamp, mut lease, mut seen) = (ack.stamp, None, 0);
        if let Some(kv) = &before {
            // An ack that was overtaken by a newer one takes nothing back.
            stamp = stamp.max(rows::stamp_of(&kv.value)?);
            seen = kv.mod_revision;
            let granted = self.link.keep_alive(kv.lease).await?;
            lease = granted.filter(|granted| *granted == seconds(ack.ttl)).map(|_| kv.lease);
            if lease.is_some() && rows::stamp_of(&kv.value)? == stamp {
                return Ok(true);
            }
        } else {
            check_count(Bounded::Readers, readers.kvs.len() + 1, READERS_MAX)?;
        }
        let id = match lease {
            Some(lease) => lease,
            None => self.link.grant(seconds(ack.ttl)).await?.0,
        };
        let txn = Txn::default().if_changed_at(key.clone(), seen).put(key, rows::stamp_value(stamp), id);
        let is_done = self.link.txn(&txn.or_read(rows::of_name(&ack.name))).await?.succeeded;
        // Whichever lease holds nothing any more is not left to run out.
        let needless =
            if is_done { before.map(|kv| kv.lease).filter(|lease| *lease != id) } else { Some(id) };
        if let Some(needless) = needless.filter(|needless| lease != Some(*needless)) {
            self.link.revoke(needless).await;
        }
        Ok(is_done)
    }

    async fn swap_once(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version> {
        let key = Part::Cell.key(name);
        let mut txn = Txn::default().if_version(key.clone(), rows::signed(expect.0));
        if expect == Version(0) {
            let [cell, cells] =
                two(self.link.txn(&Txn::read([rows::one(&*key), rows::count(CELLS)])).await?)?;
            if cell.kvs.is_empty() {
                let cells = usize::try_from(cells.count).unwrap_or(usize::MAX);
                check_count(Bounded::Names, cells.saturating_add(1), NAMES_MAX)?;
            }
            txn = txn.put(rows::index_key(CELLS, name), Vec::new(), 0);
        }
        let answered = self.link.txn(&txn.put(key, value.to_vec(), 0).or_read(rows::of_name(name))).await?;
        if answered.succeeded {
            return expect.next().ok_or(CORRUPT);
        }
        let current = refused(answered)?.cell().map_or(Version(0), |cell| cell.version);
        Err(StoreError::Conflict { current })
    }

    /// The age of the lease that tells for how long etcd has counted leases without a break; `None` if
    /// there was none yet.
    async fn up_for(&self, up: Option<i64>) -> Result<Option<Duration>> {
        let Some(lease) = up else { return Ok(None) };
        let left = self.link.time_to_live(lease).await?;
        // What is left was rounded down, so its age is rounded up: a second less is certain.
        Ok(left.map(|(left, granted)| secs((granted - left - 1).max(0))))
    }

    async fn begin_age(&self, seen: i64) -> Result<()> {
        let (lease, _) = self.link.grant(UP_TTL).await?;
        let txn = Txn::default().if_changed_at(UP.into(), seen).put(UP.into(), Vec::new(), lease);
        if !self.link.txn(&txn.or_read(rows::one(UP))).await?.succeeded {
            self.link.revoke(lease).await;
        }
        Ok(())
    }
}

fn lost() -> StoreError {
    StoreError::Unavailable { retry_after: RETRY }
}

fn two<T>(answered: Answered) -> Result<[T; 2]>
where
    [T; 2]: TryFrom<Vec<generated::RangeResponse>>,
{
    answered.ranges.try_into().map_err(|_| CORRUPT)
}

/// What a transaction that was refused read instead.
fn refused(mut answered: Answered) -> Result<Row> {
    Row::parse(answered.ranges.pop().ok_or(CORRUPT)?)
}

fn hold(claim: &Claim, fence: Fence, lease: LeaseId, ttl: i64) -> Hold {
    Hold { name: claim.name.clone(), instance: claim.instance, fence, lease, ttl: secs(ttl) }
}

/// Whole seconds, rounded up; lengths were checked.
fn seconds(ttl: Duration) -> i64 {
    i64::try_from(ttl.as_nanos().div_ceil(1_000_000_000)).unwrap_or(i64::MAX)
}

fn secs(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

#[async_trait]
impl Store for EtcdStore {
    async fn claim(&self, claim: &Claim) -> Result<Hold> {
        check_ttl(claim.ttl)?;
        within(self.budget, async {
            for _ in 0..TRIES_MAX {
                if let Some(hold) = self.claim_once(claim).await? {
                    return Ok(hold);
                }
            }
            Err(lost())
        })
        .await
    }

    async fn publish(&self, hold: &Hold, expect: Version, record: &PeerRecord) -> Result<Version> {
        check_owner(record, hold)?;
        let encoded = record.encode()?;
        within(self.budget, self.publish_once(hold, expect, &encoded)).await
    }

    async fn renew(&self, hold: &Hold) -> Result<()> {
        within(self.budget, async {
            let row = self.row(&hold.name).await?;
            row.check_hold(hold)?;
            let fence = hold.fence;
            let renewed = self.link.keep_alive(rows::signed(hold.lease.0)).await?;
            renewed.map(|_| ()).ok_or(StoreError::LeaseExpired { fence })
        })
        .await
    }

    async fn release(&self, hold: &Hold) -> Result<()> {
        within(self.budget, self.release_once(hold)).await
    }

    async fn batch_get(&self, names: &[RecordName]) -> Result<Vec<Result<Leased<Arc<Snapshot>>>>> {
        check_batch(names.len())?;
        let distinct: Vec<RecordName> = names.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
        let asked_at = self.clock.now();
        let (rows, left) = within(self.budget, async {
            let rows = self.rows(&distinct).await?;
            let alive = rows.iter().filter(|row| row.life() == Life::Alive);
            let leases = alive.filter_map(|row| row.owner().ok()).map(|owner| owner.lease).collect();
            let left = self.left(leases).await?;
            Ok((rows, left))
        })
        .await?;
        let outcome = |name: &RecordName, row: &Row| {
            let owner = row.owner()?;
            if row.life() == Life::Released {
                return Err(StoreError::NotFound);
            }
            let expired = StoreError::LeaseExpired { fence: owner.fence };
            let remaining = left.get(&owner.lease).ok_or(expired)?;
            let snapshot = Arc::new(row.snapshot(name)?);
            Ok(Leased::new(Arc::clone(&snapshot), snapshot.stamp, asked_at, *remaining))
        };
        let outcomes: HashMap<&RecordName, _> =
            distinct.iter().zip(&rows).map(|(name, row)| (name, outcome(name, row))).collect();
        Ok(names.iter().map(|name| outcomes.get(name).cloned().unwrap_or(Err(CORRUPT))).collect())
    }

    async fn list(&self, filter: &Filter) -> Result<Page> {
        check_page(filter)?;
        within(self.budget, async {
            // One more than wanted tells whether there is more.
            let limit = i64::try_from(filter.limit + 1).unwrap_or(i64::MAX);
            let held = rows::held(&filter.prefix, filter.after.as_ref(), limit);
            let mut answered = self.link.txn(&Txn::read([held])).await?;
            let kvs = answered.ranges.pop().ok_or(CORRUPT)?.kvs;
            let mut names = kvs.iter().map(|kv| held_name(&kv.key)).collect::<Result<Vec<_>>>()?;
            let has_more = names.len() > filter.limit;
            names.truncate(filter.limit);
            let rows = self.rows(&names).await?;
            let owners = rows.iter().filter_map(|row| row.owner().ok());
            let left = self.left(owners.map(|owner| owner.lease).collect()).await?;
            let mut page = Page { revision: Revision(rows::unsigned(answered.revision)?), ..Page::default() };
            page.next = names.last().filter(|_| has_more).cloned();
            // A name that was given back in between is in the watch that starts at the page's revision.
            for (name, row) in names.iter().zip(rows).filter(|(_, row)| row.life() != Life::Released) {
                let alive = row.life() == Life::Alive;
                let remaining = left.get(&row.owner()?.lease).filter(|_| alive).copied();
                page.entries.push(Listed { snapshot: Arc::new(row.snapshot(name)?), remaining });
            }
            Ok(page)
        })
        .await
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch> {
        let watch = EtcdWatch::begin(Arc::clone(&self.link), prefix.clone(), from, self.budget);
        Ok(Watch::new(within(self.budget, watch).await?))
    }

    async fn ack(&self, ack: &Ack) -> Result<()> {
        check_ttl(ack.ttl)?;
        within(self.budget, async {
            for _ in 0..TRIES_MAX {
                if self.ack_once(ack).await? {
                    return Ok(());
                }
            }
            Err(lost())
        })
        .await
    }

    async fn readers(&self, name: &RecordName) -> Result<Vec<ReaderState>> {
        within(self.budget, async {
            let reads = Txn::read([rows::of_name(name), rows::readers(name)]);
            let [row, readers] = two(self.link.txn(&reads).await?)?;
            Row::parse(row)?.owner()?;
            let lease = |kv: &generated::KeyValue| rows::unsigned(kv.lease).map(LeaseId);
            let leases = readers.kvs.iter().map(lease).collect::<Result<_>>()?;
            let left = self.left(leases).await?;
            let mut states = Vec::new();
            for kv in &readers.kvs {
                let Some(&remaining) = left.get(&lease(kv)?) else { continue };
                let (reader, stamp) = (rows::reader_of(&kv.key)?, rows::stamp_of(&kv.value)?);
                states.push(ReaderState { reader, stamp, remaining });
            }
            Ok(states)
        })
        .await
    }

    async fn read_cell(&self, name: &RecordName) -> Result<Cell> {
        within(self.budget, async { self.row(name).await?.cell() }).await
    }

    async fn swap_cell(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version> {
        check_count(Bounded::Cell, value.len(), CELL_LEN_MAX)?;
        within(self.budget, self.swap_once(name, expect, value)).await
    }

    async fn health(&self) -> Result<Health> {
        within(self.budget, async {
            let answered = self.link.txn(&Txn::read([rows::one(UP), rows::count(HELD)])).await?;
            let revision = Revision(rows::unsigned(answered.revision)?);
            let [up, held]: [generated::RangeResponse; 2] = two(answered)?;
            let up = up.kvs.first();
            let up_for = match self.up_for(up.map(|kv| kv.lease)).await? {
                Some(up_for) => up_for,
                None => {
                    self.begin_age(up.map_or(0, |kv| kv.mod_revision)).await?;
                    Duration::ZERO
                }
            };
            Ok(Health { up_for, revision, num_names: rows::unsigned(held.count)? })
        })
        .await
    }
}

fn held_name(key: &[u8]) -> Result<RecordName> {
    let name = std::str::from_utf8(key).ok().and_then(|key| key.strip_prefix(HELD));
    name.and_then(|name| RecordName::parse(name).ok()).ok_or(CORRUPT)
}
