//! `k8s://`: records as resources of a Kubernetes cluster, leases as its own.
//!
//! Owns one client of one namespace. What is kept under a name is an `IbexEntry` ([`crd`] is its
//! definition, every field of it); who is alive is a `Lease` beside it, so that a heartbeat never rewrites a
//! record. Every write carries the revision that it stands on, and the server refuses it if that is not the
//! newest. Leases are counted by the server's clock, to within a second: see `k8s/lease.rs`.
//!
//! A claim writes the lease first, then the row: whoever changed the lease has the fence, and whoever finds
//! a lease ahead of its row finishes that claim, waits, or takes over. Kubernetes announces no end of a
//! lease, so whoever notices one (a watch looks regularly, a claim always) says so in the row, once.
//!
//! What differs from other stores: leases last [`TTL_MIN_HERE`] at least; the time during which the API
//! server was away counts against leases, so an expiry is to be judged by [`Health::up_for`], which is how
//! long *this client* has had no failure; fences are forgotten with a resource that somebody deletes by hand;
//! how many names there may be is the cluster's quota.
//!
//! Needs the verbs get, list, watch, create, update and delete on `ibexentries` and `leases` of the namespace;
//! who may only read leaves it to others to announce the ends of leases.

mod api;
mod lease;
mod rows;
mod schema;
mod watch;

use core::time::Duration;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use parking_lot::Mutex;

use self::api::{Answer, Api, ENTRIES, LEASES, Refusal, ServerTime, outage};
use self::lease::{Grant, Role, Terms, object_name, selector};
use self::rows::Seen;
pub use self::schema::{
    Base64, BufferSpec, CellSpec, Dec, DeviceSpec, EntrySpec, EpIbgdaSpec, ExtraSpec, IbexEntry,
    InstanceSpec, Life, ManifestSpec, NixlSpec, PortSpec, ReachSpec, RecordSpec, RingSpec, RowSpec,
    SourceSpec, TcpSpec, TransferEngineSpec, TransportSpec, WaySpec,
};
use self::schema::{CORRUPT, Mirror};
use self::watch::K8sWatch;
use crate::clock::{Clock, within};
use crate::error::{Bounded, InputError, Result, StoreError};
use crate::ids::{Fence, LeaseId, Revision, Stamp, Version};
use crate::lease::{Leased, Moment};
use crate::limits::{CELL_LEN_MAX, READERS_MAX};
use crate::name::{Prefix, RecordName};
use crate::record::PeerRecord;
use crate::store::{
    Ack, Cell, Claim, Filter, Health, Hold, Listed, Page, ReaderState, Snapshot, Store, Watch, check_batch,
    check_count, check_page, check_ttl,
};
use crate::table::rules::check_owner;

/// The shortest lease that is granted: an age is known to within a second, twice.
pub const TTL_MIN_HERE: Duration = Duration::from_secs(5);
/// How often a write that lost against another one looks again before it gives up.
const TRIES_MAX: usize = 16;
/// Names up to which a batch reads them one by one; for more it lists the namespace.
const SINGLE_READS_MAX: usize = 8;

/// How to reach a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct K8sConnect {
    /// The namespace that holds our resources.
    pub namespace: String,
    /// The API server, for a plain connection without credentials (`kubectl proxy`, a test); without, kube
    /// looks for a configuration where kubectl does: the kubeconfig, or the pod's service account.
    pub server: Option<String>,
    /// How long an operation may take.
    pub budget: Duration,
}

/// The definition of our resource, to be applied to a cluster once.
#[must_use]
pub fn crd() -> CustomResourceDefinition {
    IbexEntry::crd()
}

/// The same as YAML: what `crd/ibexentries.yaml` holds.
///
/// # Errors
/// [`StoreError::Corrupt`] if it cannot be spelled, which a test rules out.
pub fn crd_yaml() -> Result<String> {
    // By way of JSON, whose fields come in a fixed order.
    let definition = serde_json::to_value(crd()).map_err(|_| CORRUPT)?;
    let yaml = serde_saphyr::to_string(&definition).map_err(|_| CORRUPT)?;
    Ok(format!("# Made from src/k8s/schema.rs by examples/crd.rs. To be applied to a cluster once.\n{yaml}"))
}

/// A record as the resource shows it.
#[must_use]
pub fn show(record: &PeerRecord) -> RecordSpec {
    RecordSpec::show(record)
}

/// The record that a resource shows.
///
/// # Errors
/// [`StoreError::Corrupt`] for what is not a record.
pub fn read(shown: RecordSpec) -> Result<PeerRecord> {
    shown.read()
}

/// A store in a namespace of a Kubernetes cluster.
#[derive(Clone)]
pub struct K8sStore {
    api: Arc<Api>,
    clock: Clock,
    budget: Duration,
    /// Since when this client has had no failure.
    up_since: Arc<Mutex<Option<Moment>>>,
}

impl std::fmt::Debug for K8sStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("K8sStore").field("namespace", &self.api.namespace()).finish_non_exhaustive()
    }
}

impl K8sStore {
    /// A client. Nothing is sent, and no configuration is read, before it is used.
    ///
    /// # Errors
    /// [`StoreError::Input`] for a server or a namespace that cannot be.
    pub fn new(connect: &K8sConnect, clock: Clock) -> Result<Self> {
        let is_good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let namespace = &connect.namespace;
        if !(1..=63).contains(&namespace.len()) || !namespace.chars().all(is_good) {
            return Err(InputError::new("namespace", namespace, "1 to 63 characters of a-z 0-9 -").into());
        }
        let api = Arc::new(Api::new(namespace, connect.server.as_deref())?);
        Ok(Self { api, clock, budget: connect.budget, up_since: Arc::default() })
    }

    /// Runs an operation under the budget, and notes whether the server answered.
    async fn operate<T>(&self, operation: impl Future<Output = Result<T, Refusal>>) -> Result<T> {
        let outcome = within(self.budget, async { operation.await.map_err(StoreError::from) }).await;
        let mut up_since = self.up_since.lock();
        if outcome.as_ref().is_err_and(StoreError::is_transient) {
            *up_since = None;
        } else {
            up_since.get_or_insert(self.clock.now());
        }
        outcome
    }

    async fn entry(&self, role: Role, name: &RecordName) -> Result<Option<IbexEntry>, Refusal> {
        let entry = match self.api.get::<IbexEntry>(ENTRIES, &object_name(role, name, None)).await {
            Ok(answer) => Some(answer.value),
            Err(Refusal::Absent(_)) => None,
            Err(refusal) => return Err(refusal),
        };
        if entry.as_ref().is_some_and(|entry| entry.spec.name != name.as_str()) {
            return Err(CORRUPT.into());
        }
        Ok(entry)
    }

    /// Reads one name. The row comes first: a lease that is newer than it only helps its owner.
    async fn look(&self, name: &RecordName) -> Result<Seen, Refusal> {
        let entry = self.entry(Role::Row, name).await?;
        match self.api.get::<Lease>(LEASES, &object_name(Role::Owner, name, None)).await {
            Ok(Answer { value, at }) => Ok(Seen { entry, lease: Some(Grant::read(value)?), now: at }),
            Err(Refusal::Absent(at)) => Ok(Seen { entry, lease: None, now: at }),
            Err(refusal) => Err(refusal),
        }
    }

    /// Reads everything under a prefix.
    async fn look_under(&self, prefix: &Prefix) -> Result<(HashMap<RecordName, Seen>, Revision), Refusal> {
        let rows = self.api.list::<IbexEntry>(ENTRIES, &selector(prefix, Some(Role::Row))).await?;
        let leases = self.api.list::<Lease>(LEASES, &selector(prefix, Some(Role::Owner))).await?;
        let now = leases.at;
        let mut seen = HashMap::new();
        for entry in rows.items {
            let name = RecordName::parse(&entry.spec.name).map_err(|_| CORRUPT)?;
            seen.insert(name, Seen { entry: Some(entry), lease: None, now });
        }
        for lease in leases.items {
            let lease = Grant::read(lease)?;
            if let Some(seen) = seen.get_mut(&lease.name) {
                seen.lease = Some(lease);
            }
        }
        Ok((seen, Revision(rows.revision)))
    }

    /// Writes a row or a cell over what was seen.
    async fn write(
        &self,
        seen: &Seen,
        role: Role,
        name: &RecordName,
        spec: EntrySpec,
    ) -> Result<(), Refusal> {
        let object = IbexEntry { metadata: seen.metadata(role, name), spec };
        match &seen.entry {
            Some(_) => self.api.replace(ENTRIES, &object_name(role, name, None), &object).await,
            None => self.api.create(ENTRIES, &object).await,
        }
    }

    /// Writes a lease over what was seen.
    async fn grant(&self, terms: &Terms<'_>, before: Option<&Grant>, now: ServerTime) -> Result<(), Refusal> {
        match before {
            Some(before) => self.api.replace(LEASES, &terms.object_name(), &before.renewed(terms, now)).await,
            None => self.api.create(LEASES, &terms.lease(now)).await,
        }
    }

    /// One attempt at a claim; [`Refusal::Conflict`] if another change came between.
    async fn claim_once(&self, claim: &Claim) -> Result<Hold, Refusal> {
        let seen = self.look(&claim.name).await?;
        let terms =
            |stamp, ttl| Terms { role: Role::Owner, name: &claim.name, holder: claim.instance, stamp, ttl };
        let owner = seen.alive().or_else(|| seen.claim_under_way());
        let (fence, ttl) = match owner {
            Some(lease) if lease.holder == claim.instance => {
                let (stamp, ttl) = (lease.stamp, lease.ttl);
                self.grant(&terms(stamp, ttl), Some(lease), seen.now).await?;
                if seen.alive().is_some() {
                    return Ok(hold(claim, stamp.fence, ttl));
                }
                (stamp.fence, ttl)
            }
            Some(lease) if !claim.takeover => {
                let remaining = lease.remaining(seen.now).max(Duration::from_secs(1));
                return Err(StoreError::Held { fence: lease.stamp.fence, remaining }.into());
            }
            _ => {
                if seen.is_silently_over() {
                    self.announce_end(&claim.name, &seen).await?;
                    return Err(Refusal::Conflict);
                }
                let fence = Fence(seen.newest_fence().0.checked_add(1).ok_or(CORRUPT)?);
                let ttl = claim.ttl.max(TTL_MIN_HERE);
                let terms = terms(Stamp::new(fence, Version(0)), ttl);
                self.grant(&terms, seen.lease.as_ref(), seen.now).await?;
                (fence, ttl)
            }
        };
        self.write(&seen, Role::Row, &claim.name, rows::claimed(&claim.name, fence, claim.instance)).await?;
        Ok(hold(claim, fence, ttl))
    }

    /// Says in the row that its owner's lease ran out. Whoever comes second finds it said.
    async fn announce_end(&self, name: &RecordName, seen: &Seen) -> Result<(), Refusal> {
        self.write(seen, Role::Row, name, seen.with_life(Life::Expired)?).await
    }

    /// Announces every end under a prefix that nobody announced yet.
    async fn sweep(&self, prefix: &Prefix) -> Result<(), Refusal> {
        let (seen, _) = self.look_under(prefix).await?;
        for (name, seen) in seen.iter().filter(|(name, seen)| prefix.covers(name) && seen.is_silently_over())
        {
            match self.announce_end(name, seen).await {
                // Somebody else was faster.
                Ok(()) | Err(Refusal::Conflict | Refusal::Absent(_)) => {}
                Err(refusal) => return Err(refusal),
            }
        }
        Ok(())
    }

    async fn publish_once(
        &self,
        hold: &Hold,
        expect: Version,
        record: &PeerRecord,
    ) -> Result<Version, Refusal> {
        let seen = self.look(&hold.name).await?;
        seen.check_hold(hold)?;
        let current = seen.stamp()?.version;
        if expect != current {
            return Err(StoreError::Conflict { current }.into());
        }
        let version = current.next().ok_or(CORRUPT)?;
        self.write(&seen, Role::Row, &hold.name, rows::published(hold, version, record)).await?;
        Ok(version)
    }

    async fn renew_once(&self, hold: &Hold) -> Result<(), Refusal> {
        let seen = self.look(&hold.name).await?;
        let lease = seen.check_hold(hold)?;
        let (name, holder, stamp, ttl) = (&hold.name, hold.instance, lease.stamp, lease.ttl);
        let terms = Terms { role: Role::Owner, name, holder, stamp, ttl };
        self.grant(&terms, Some(lease), seen.now).await
    }

    async fn release_once(&self, hold: &Hold) -> Result<(), Refusal> {
        let seen = self.look(&hold.name).await?;
        let lease = seen.check_hold(hold)?;
        self.write(&seen, Role::Row, &hold.name, seen.with_life(Life::Released)?).await?;
        // Best effort: a lease that is left behind holds nothing.
        let _ = self.api.delete(LEASES, lease.object_name(), lease.revision()).await;
        Ok(())
    }

    async fn ack_once(&self, ack: &Ack) -> Result<(), Refusal> {
        let seen = self.look(&ack.name).await?;
        let current = seen.stamp()?;
        if seen.is_released() {
            return Err(StoreError::NotFound.into());
        }
        if ack.stamp > current {
            return Err(StoreError::Conflict { current: current.version }.into());
        }
        let (readers, now) = self.grants_of_readers(&ack.name).await?;
        let before = readers.iter().find(|reader| reader.holder == ack.reader);
        if before.is_none() {
            let alive = readers.iter().filter(|reader| !reader.is_over(now)).count();
            check_count(Bounded::Readers, alive + 1, READERS_MAX)?;
        }
        // An ack that was overtaken by a newer one takes nothing back; one that ran out counts no more.
        let alive = before.filter(|before| !before.is_over(now));
        let stamp = alive.map_or(ack.stamp, |before| before.stamp.max(ack.stamp));
        let (name, holder, ttl) = (&ack.name, ack.reader, ack.ttl.max(TTL_MIN_HERE));
        let terms = Terms { role: Role::Reader, name, holder, stamp, ttl };
        self.grant(&terms, before, now).await?;
        for gone in readers.iter().filter(|reader| reader.holder != ack.reader && reader.is_over(now)) {
            // Best effort: left behind, it only takes up room.
            let _ = self.api.delete(LEASES, gone.object_name(), gone.revision()).await;
        }
        Ok(())
    }

    async fn grants_of_readers(&self, name: &RecordName) -> Result<(Vec<Grant>, ServerTime), Refusal> {
        let labels = selector(&Prefix::from(name), Some(Role::Reader));
        let listing = self.api.list::<Lease>(LEASES, &labels).await?;
        let grants = listing.items.into_iter().map(Grant::read).collect::<Result<Vec<_>>>()?;
        Ok((grants, listing.at))
    }

    async fn swap_once(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version, Refusal> {
        let seen = Seen { entry: self.entry(Role::Cell, name).await?, ..Seen::default() };
        let current = match &seen.entry {
            Some(entry) => rows::cell(&entry.spec)?.version,
            None => Version(0),
        };
        if expect != current {
            return Err(StoreError::Conflict { current }.into());
        }
        let version = current.next().ok_or(CORRUPT)?;
        self.write(&seen, Role::Cell, name, rows::cell_spec(name, version, value)).await?;
        Ok(version)
    }

    /// Tries again as long as other changes come between.
    async fn persist<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, Refusal>
    where
        F: Future<Output = Result<T, Refusal>>,
    {
        for _ in 0..TRIES_MAX {
            match attempt().await {
                Err(Refusal::Conflict) => {}
                outcome => return outcome,
            }
        }
        Err(outage().into())
    }
}

fn hold(claim: &Claim, fence: Fence, ttl: Duration) -> Hold {
    Hold { name: claim.name.clone(), instance: claim.instance, fence, lease: LeaseId(fence.0), ttl }
}

/// What a batch says about one name.
fn outcome(seen: Option<&Seen>, asked_at: Moment) -> Result<Leased<Arc<Snapshot>>> {
    let seen = seen.ok_or(StoreError::NotFound)?;
    let snapshot = Arc::new(seen.snapshot()?);
    let stamp = snapshot.stamp;
    let lease = seen.alive().ok_or(StoreError::LeaseExpired { fence: stamp.fence })?;
    Ok(Leased::new(snapshot, stamp, asked_at, lease.remaining(seen.now)))
}

#[async_trait]
impl Store for K8sStore {
    async fn claim(&self, claim: &Claim) -> Result<Hold> {
        check_ttl(claim.ttl)?;
        self.operate(self.persist(|| self.claim_once(claim))).await
    }

    async fn publish(&self, hold: &Hold, expect: Version, record: &PeerRecord) -> Result<Version> {
        check_owner(record, hold)?;
        record.encode()?;
        self.operate(self.persist(|| self.publish_once(hold, expect, record))).await
    }

    async fn renew(&self, hold: &Hold) -> Result<()> {
        self.operate(self.persist(|| self.renew_once(hold))).await
    }

    async fn release(&self, hold: &Hold) -> Result<()> {
        self.operate(self.persist(|| self.release_once(hold))).await
    }

    async fn batch_get(&self, names: &[RecordName]) -> Result<Vec<Result<Leased<Arc<Snapshot>>>>> {
        check_batch(names.len())?;
        let distinct: BTreeSet<&RecordName> = names.iter().collect();
        let asked_at = self.clock.now();
        let looked = async {
            if distinct.len() > SINGLE_READS_MAX {
                return Ok(self.look_under(&Prefix::all()).await?.0);
            }
            let mut looked = HashMap::new();
            for name in distinct {
                looked.insert(name.clone(), self.look(name).await?);
            }
            Ok(looked)
        };
        let looked = self.operate(looked).await?;
        Ok(names.iter().map(|name| outcome(looked.get(name), asked_at)).collect())
    }

    async fn list(&self, filter: &Filter) -> Result<Page> {
        check_page(filter)?;
        let (seen, revision) = self.operate(self.look_under(&filter.prefix)).await?;
        let after = |name: &RecordName| filter.after.as_ref().is_none_or(|after| name > after);
        let mut names: Vec<(&RecordName, &Seen)> = seen
            .iter()
            .filter(|(name, seen)| filter.prefix.covers(name) && after(name) && !seen.is_released())
            .collect();
        names.sort_by_key(|(name, _)| *name);
        let mut page = Page { revision, ..Page::default() };
        if names.len() > filter.limit {
            names.truncate(filter.limit);
            page.next = names.last().map(|(name, _)| (*name).clone());
        }
        for (_, seen) in names {
            let remaining = seen.alive().map(|lease| lease.remaining(seen.now));
            page.entries.push(Listed { snapshot: Arc::new(seen.snapshot()?), remaining });
        }
        Ok(page)
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch> {
        Ok(Watch::new(self.operate(K8sWatch::begin(self.clone(), prefix.clone(), from)).await?))
    }

    async fn ack(&self, ack: &Ack) -> Result<()> {
        check_ttl(ack.ttl)?;
        self.operate(self.persist(|| self.ack_once(ack))).await
    }

    async fn readers(&self, name: &RecordName) -> Result<Vec<ReaderState>> {
        self.operate(async {
            self.entry(Role::Row, name).await?.ok_or(StoreError::NotFound)?;
            let (grants, now) = self.grants_of_readers(name).await?;
            let alive = grants.iter().filter(|grant| !grant.is_over(now));
            let state = |grant: &Grant| ReaderState {
                reader: grant.holder,
                stamp: grant.stamp,
                remaining: grant.remaining(now),
            };
            Ok(alive.map(state).collect())
        })
        .await
    }

    async fn read_cell(&self, name: &RecordName) -> Result<Cell> {
        self.operate(async {
            let entry = self.entry(Role::Cell, name).await?.ok_or(StoreError::NotFound)?;
            Ok(rows::cell(&entry.spec)?)
        })
        .await
    }

    async fn swap_cell(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version> {
        check_count(Bounded::Cell, value.len(), CELL_LEN_MAX)?;
        self.operate(self.persist(|| self.swap_once(name, expect, value))).await
    }

    async fn health(&self) -> Result<Health> {
        let (seen, revision) = self.operate(self.look_under(&Prefix::all())).await?;
        let num_names = seen.values().filter(|seen| !seen.is_released()).count() as u64;
        let up_since = *self.up_since.lock();
        let up_for = up_since.map_or(Duration::ZERO, |since| self.clock.now().since(since));
        Ok(Health { up_for, revision, num_names })
    }
}
