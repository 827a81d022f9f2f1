//! One process's end of all transfers.

use core::time::Duration;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ibex_abi::types::QpNum;
use ibex_hca::control_region::ControlRegion;
use ibex_hca::host_qp::{ConnectSpec, Endpoint};
use ibex_hca::{Access, Hca};
use ibex_metadata::change::Verdict;
use ibex_metadata::clock::Clock;
use ibex_metadata::derived::{Kind, Part, Registry, RegistryCounters, Retiree};
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::{BufferId, Fence, InstanceId, Stamp};
use ibex_metadata::lease::{Leased, Moment};
use ibex_metadata::name::RecordName;
use ibex_metadata::record::{self, Identity, PeerRecord};
use ibex_metadata::refresh::Observer;
use ibex_metadata::scope::Guard;
use ibex_metadata::segments::SegmentHandle;
use ibex_metadata::store::Snapshot;
use parking_lot::{Mutex, RwLock};

use super::address::{self, endpoint, first_psn, unreachable_peer};
use super::seat::{Doomed, RemoteRange, Seat};
use super::work::{Op, Region, Request, Work};
use super::{Batch, TransferError};
use crate::buffer::OwnedPd;

/// Peer slots at most.
const SLOTS_MAX: u32 = 4096;
/// Derived values at most: a queue pair per slot, and keys.
const DERIVED_MAX: u32 = 1 << 16;
/// Requests that wait for one peer at most.
const WAITING_MAX: usize = 4096;
/// Bytes of control memory per slot, beside the rings: records, completion queues, alignment.
const SLOT_OVERHEAD: u64 = 16 << 10;
/// Largest request: a message of an mlx5 device.
const LEN_MAX: u32 = 1 << 30;

/// How a requester is made.
#[derive(Debug, Clone, Copy)]
pub struct RequesterOptions {
    /// Which process this is.
    pub instance: InstanceId,
    /// Its own place in its peers' lists: its rank.
    pub slot: u32,
    /// Peers, itself included, at most.
    pub num_slots: u32,
    /// Log2 of the requests posted to one peer at a time.
    pub log_sq_size: u8,
    /// How connections behave; sequence numbers are chosen by the requester.
    pub connect: ConnectSpec,
}

impl RequesterOptions {
    /// The usual options for this process.
    #[must_use]
    pub fn new(instance: InstanceId, slot: u32, num_slots: u32) -> Self {
        Self { instance, slot, num_slots, log_sq_size: 6, connect: ConnectSpec::default() }
    }
}

/// A peer's buffer, opened: identity of the buffer, and of what was derived for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    name: RecordName,
    owner: (Identity, Fence),
    buffer: BufferId,
    handle: SegmentHandle,
    len: u64,
    access: record::Access,
    stamp: Stamp,
}

impl Segment {
    /// Whose it is.
    #[must_use]
    pub const fn name(&self) -> &RecordName {
        &self.name
    }

    /// Which of the owner's buffers.
    #[must_use]
    pub const fn buffer(&self) -> BufferId {
        self.buffer
    }

    /// Slot and generation of the key that it was opened with.
    #[must_use]
    pub const fn handle(&self) -> SegmentHandle {
        self.handle
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes; records do not allow that.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Which snapshot it was opened under.
    #[must_use]
    pub const fn stamp(&self) -> Stamp {
        self.stamp
    }
}

/// What a requester did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TransferCounters {
    /// Requests posted.
    pub posted: u64,
    /// Of those, posted with a newer key than they were submitted with.
    pub re_resolved: u64,
    /// Requests that ended before they were posted, because of what happened to their peer.
    pub refused: u64,
    /// Requests whose queue pair the device would not let go of; their memory is pinned.
    pub pinned: u64,
    /// Connections made.
    pub links: u64,
    /// Connections that could not be made.
    pub link_failures: u64,
    /// What was derived from records.
    pub derived: RegistryCounters,
}

#[derive(Debug, Default)]
struct Counters {
    posted: AtomicU64,
    re_resolved: AtomicU64,
    refused: AtomicU64,
    links: AtomicU64,
    link_failures: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// What is made of records.
#[derive(Debug)]
enum Derived {
    /// The seat of this slot is linked.
    Link(u32),
    /// A buffer can be reached.
    Remote(RemoteRange),
}

#[derive(Debug)]
struct State {
    registry: Registry<Derived>,
    /// The newest lease on each name, with whom it was granted for.
    leases: HashMap<RecordName, (Identity, Leased<()>)>,
}

/// Transfers of one process. See the module's documentation.
pub struct Requester {
    seats: Vec<Mutex<Seat>>,
    doomed: Mutex<Vec<Doomed>>,
    state: RwLock<State>,
    region: ControlRegion,
    pd: Arc<OwnedPd>,
    hca: Arc<dyn Hca>,
    options: RequesterOptions,
    clock: Clock,
    next_buffer: AtomicU64,
    adverts: AtomicU64,
    failed: Mutex<BTreeSet<RecordName>>,
    counters: Counters,
}

impl std::fmt::Debug for Requester {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Requester").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Requester {
    /// A requester on this device, with a queue pair per peer slot, none connected. Leases are counted by `clock`,
    /// which must be the store's.
    ///
    /// # Errors
    /// [`TransferError::OutOfRange`] for options outside their limits; what the device refused.
    pub fn new(hca: &Arc<dyn Hca>, options: RequesterOptions, clock: Clock) -> Result<Self, TransferError> {
        let slots = u64::from(options.num_slots);
        in_range("num_slots", slots, 1, SLOTS_MAX.into())?;
        in_range("slot", options.slot.into(), 0, slots - 1)?;
        in_range("log_sq_size", options.log_sq_size.into(), 1, 12)?;
        let ring = 64_u64 << options.log_sq_size;
        let region = ControlRegion::host(hca, slots * (3 * ring + SLOT_OVERHEAD))?;
        let state = State { registry: Registry::new(DERIVED_MAX), leases: HashMap::new() };
        let requester = Self {
            seats: (0..options.num_slots).map(|_| Mutex::new(Seat::new())).collect(),
            doomed: Mutex::default(),
            state: RwLock::new(state),
            region,
            pd: OwnedPd::new(hca)?,
            hca: Arc::clone(hca),
            options,
            clock,
            next_buffer: AtomicU64::new(1),
            adverts: AtomicU64::new(0),
            failed: Mutex::default(),
            counters: Counters::default(),
        };
        for slot in (0..options.num_slots).filter(|slot| *slot != options.slot) {
            requester.offer(&mut requester.seat(slot).lock())?;
        }
        Ok(requester)
    }

    /// The clock by which it counts leases.
    #[must_use]
    pub const fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Allocates and registers memory, under an identity of its own.
    ///
    /// # Errors
    /// What the device refused.
    pub fn register(&self, len: u64, access: Access) -> Result<Region, TransferError> {
        let id = BufferId(self.next_buffer.fetch_add(1, Ordering::Relaxed));
        self.register_as(id, len, access)
    }

    /// The same under an identity that the caller vouches for: new memory that takes the place of other memory.
    ///
    /// # Errors
    /// What the device refused.
    pub fn register_as(&self, id: BufferId, len: u64, access: Access) -> Result<Region, TransferError> {
        Ok(Region::new(&self.hca, &self.pd, id, len, access)?)
    }

    /// Says in the record of this process how its peers reach it: device, queue pairs by peer slot, rank. To be
    /// published again whenever [`Requester::adverts`] has grown. Buffers are the caller's to add.
    pub fn advertise(&self, record: &mut PeerRecord) {
        let qpns = self.seats.iter().map(|seat| seat.lock().qpn()).collect();
        record.rank = Some(self.options.slot);
        record.world_hint = self.options.num_slots;
        address::describe(&self.hca.port(), qpns, record);
    }

    /// Grows whenever there is something new to advertise.
    #[must_use]
    pub fn adverts(&self) -> u64 {
        self.adverts.load(Ordering::Acquire)
    }

    /// Names whose queue pair failed since the last call: to be asked for anew, off the data path.
    #[must_use]
    pub fn take_failed(&self) -> BTreeSet<RecordName> {
        std::mem::take(&mut self.failed.lock())
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> TransferCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let pinned = self.doomed.lock().iter().map(Doomed::len).sum::<usize>() as u64;
        TransferCounters {
            posted: get(&self.counters.posted),
            re_resolved: get(&self.counters.re_resolved),
            refused: get(&self.counters.refused),
            pinned,
            links: get(&self.counters.links),
            link_failures: get(&self.counters.link_failures),
            derived: self.state.read().registry.counters(),
        }
    }

    /// The newest stamp that is known of a name. Nothing older is used any more.
    #[must_use]
    pub fn known(&self, name: &RecordName) -> Option<Stamp> {
        self.state.read().registry.known(name).map(|snapshot| snapshot.stamp)
    }

    /// Whether requests to a name can be posted.
    #[must_use]
    pub fn is_linked(&self, name: &RecordName) -> bool {
        self.state.read().registry.find(name, self.path(), Kind::QueuePair).is_some()
    }

    /// Whether the peer has answered that it is connected, too: no request is posted before. Asks it if that was not
    /// done, so that the first request need not wait; [`Requester::progress`] takes the answer.
    pub fn greet(&self, name: &RecordName) -> bool {
        let state = self.state.read();
        let link = state.registry.find(name, self.path(), Kind::QueuePair);
        let Some((_, Derived::Link(slot))) = link else { return false };
        let mut seat = self.seat(*slot).lock();
        seat.greet();
        seat.is_ready()
    }

    /// Opens a buffer of a resolved peer.
    ///
    /// # Errors
    /// The guard's lease ran out; a newer record is known ([`TransferError::Outdated`]); the buffer is not
    /// offered.
    pub fn open(&self, guard: &Guard<'_>, buffer: BufferId) -> Result<Segment, TransferError> {
        let snapshot = self.admit(guard)?;
        let mut state = self.state.write();
        let handle = key_of(&mut state, &snapshot, buffer)?;
        let entry = snapshot.record.buffers.iter().find(|entry| entry.buffer_id == buffer);
        let entry = entry.ok_or(TransferError::NotOffered { buffer })?;
        Ok(Segment {
            name: snapshot.name.clone(),
            owner: owner_of(&snapshot),
            buffer,
            handle,
            len: entry.len,
            access: entry.access,
            stamp: snapshot.stamp,
        })
    }

    /// Submits requests under a guard. They are posted as the queue has room, in order, each with the key that is
    /// then the newest; their outcome is known within `budget`.
    ///
    /// # Errors
    /// Nothing is submitted then: the lease ran out, the record is not the newest, a request is out of range or not
    /// allowed, too many wait.
    pub fn submit<'g>(
        &'g self,
        guard: &'g Guard<'g>,
        requests: &[Request<'_>],
        budget: Duration,
    ) -> Result<Batch<'g>, TransferError> {
        let deadline = self.clock.now().after(budget);
        let nanos = u64::try_from(budget.as_nanos()).unwrap_or(u64::MAX);
        in_range("budget in ns", nanos, 1, u64::MAX)?;
        let snapshot = self.admit(guard)?;
        let slot = self.slot_of(&snapshot)?;
        for request in requests {
            check(request, &snapshot)?;
        }
        let works: Vec<Work> = requests.iter().map(|request| work(request, deadline, budget)).collect();
        let ops = works.iter().map(|work| Arc::clone(&work.op)).collect();
        let mut seat = self.seat(slot).lock();
        let waiting = seat.waiting.len() + works.len();
        if waiting > WAITING_MAX {
            return Err(TransferError::Full { slot, waiting, limit: WAITING_MAX });
        }
        seat.waiting.extend(works);
        drop(seat);
        self.progress();
        Ok(Batch::new(self, guard, ops, deadline, budget))
    }

    /// Takes completions and posts what waits; says how much it did. Any thread may call it, at any time; it does
    /// not wait for devices, peers or stores.
    pub fn progress(&self) -> usize {
        let mut todo = Todo::default();
        let state = self.state.read();
        let done: usize = (0..self.options.num_slots).map(|slot| self.turn(&state, slot, &mut todo)).sum();
        drop(state);
        let extra = todo.keys.len() + todo.failed.len();
        if extra > 0 {
            self.catch_up(todo);
        }
        done + extra
    }

    /// Tries again to destroy what the device would not let go of; says how many requests stay pinned.
    pub fn sweep(&self) -> usize {
        let mut doomed = self.doomed.lock();
        for one in std::mem::take(&mut *doomed) {
            match one.try_end() {
                Ok(works) => works.into_iter().for_each(|work| work.end(Err(TransferError::Cancelled))),
                Err(one) => doomed.push(one),
            }
        }
        doomed.iter().map(Doomed::len).sum()
    }
}

/// What progress found that needs the registry for itself alone.
#[derive(Default)]
struct Todo {
    keys: Vec<(u32, RecordName, BufferId)>,
    failed: Vec<u32>,
}

/// Why a request cannot be posted now.
enum NotNow {
    /// Its buffer is offered under another key, which is to be taken first.
    NeedsKey,
    Never(TransferError),
}

impl Requester {
    const fn path(&self) -> Part {
        Part::Path { slot: self.options.slot }
    }

    fn seat(&self, slot: u32) -> &Mutex<Seat> {
        // CAST: below num_slots, which is a u32.
        &self.seats[slot as usize]
    }

    fn slot_of(&self, snapshot: &Snapshot) -> Result<u32, TransferError> {
        let rank = snapshot.record.rank;
        let usable = |slot: &u32| *slot < self.options.num_slots && *slot != self.options.slot;
        rank.filter(usable).ok_or_else(|| unreachable_peer(snapshot, "a rank among the peer slots"))
    }

    fn offer(&self, seat: &mut Seat) -> Result<(), TransferError> {
        let options = &self.options;
        if seat.offer(&self.region, self.pd.get(), options.log_sq_size, &options.connect)? {
            self.adverts.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Checks the guard and makes sure that its snapshot is the newest known.
    fn admit(&self, guard: &Guard<'_>) -> Result<Arc<Snapshot>, TransferError> {
        let leased = guard.leased();
        let snapshot = leased.check(self.clock.now())?;
        let state = self.state.read();
        let is_known = state.registry.known(&snapshot.name).is_some_and(|known| Arc::ptr_eq(known, snapshot));
        drop(state);
        if !is_known {
            let mut state = self.state.write();
            match self.observe(&mut state, snapshot) {
                Some(Verdict::Stale) => {
                    let known =
                        state.registry.known(&snapshot.name).map_or(snapshot.stamp, |known| known.stamp);
                    return Err(TransferError::Outdated { seen: snapshot.stamp, known });
                }
                Some(Verdict::ConcurrentPublisher) => {
                    return Err(TransferError::ConcurrentPublisher { stamp: snapshot.stamp });
                }
                _ => {}
            }
        }
        self.grant(leased);
        Ok(Arc::clone(snapshot))
    }

    fn grant(&self, leased: &Leased<Arc<Snapshot>>) {
        let snapshot = leased.unchecked();
        if self.is_granted(leased) {
            return;
        }
        let now = self.clock.now();
        let newer = Leased::new((), leased.stamp(), now, leased.remaining(now));
        self.state.write().leases.insert(snapshot.name.clone(), (snapshot.identity, newer));
    }

    /// Whether a lease at least as good is known. Of two that race here, either is a lease that was granted.
    fn is_granted(&self, leased: &Leased<Arc<Snapshot>>) -> bool {
        let snapshot = leased.unchecked();
        let state = self.state.read();
        // By fence first: a late answer about an earlier owner is no news.
        state.leases.get(&snapshot.name).is_some_and(|(_, known)| {
            let order = (leased.stamp().fence, leased.valid_until());
            (known.stamp().fence, known.valid_until()) >= order
        })
    }

    /// Takes a snapshot in: what it retires is taken down, then what it offers is connected.
    fn observe(&self, state: &mut State, snapshot: &Arc<Snapshot>) -> Option<Verdict> {
        let seen = state.registry.observe(snapshot);
        let is_replaced = seen.verdict == Some(Verdict::Replaced);
        self.take_down(seen.retired, is_replaced);
        if !matches!(seen.verdict, Some(Verdict::Stale | Verdict::ConcurrentPublisher)) {
            // A peer that cannot be reached yet is no failure of the snapshot.
            let _ = self.link(state, snapshot);
        }
        seen.verdict
    }

    fn take_down(&self, retired: Vec<Retiree<Derived>>, is_replaced: bool) {
        for Retiree { value, .. } in retired {
            let Derived::Link(slot) = value else { continue };
            let mut seat = self.seat(slot).lock();
            let path = |work: &Work| TransferError::PathRetired { name: work.name.clone() };
            let doomed = if is_replaced {
                let doomed = seat.destroy(|work| TransferError::PeerReplaced { name: work.name.clone() });
                // A refusal leaves the seat empty; the next connection tries again.
                let _ = self.offer(&mut seat);
                doomed
            } else {
                seat.reset(&self.options.connect, path)
            };
            self.doomed.lock().extend(doomed);
        }
    }

    /// Connects to a peer, unless that is done.
    fn link(&self, state: &mut State, snapshot: &Arc<Snapshot>) -> Result<(), TransferError> {
        let name = &snapshot.name;
        if state.registry.find(name, self.path(), Kind::QueuePair).is_some() {
            return Ok(());
        }
        let slot = self.slot_of(snapshot)?;
        let (instance, address, qpn) = endpoint(snapshot, self.options.slot)?;
        // A port that nobody has introduced yet costs no queue pair, whose number the peer was told: the next look may
        // find it.
        if let Err(error) = self.hca.resolve(&address) {
            count(&self.counters.link_failures, 1);
            return Err(error.into());
        }
        let mut seat = self.seat(slot).lock();
        if seat.is_linked() {
            return Err(unreachable_peer(snapshot, "a rank of its own"));
        }
        self.offer(&mut seat)?;
        let (here, there) = ((self.options.instance, seat.qpn()), (instance, qpn));
        let remote = Endpoint { address, qpn: QpNum::new(qpn), psn: first_psn(there, here) };
        let spec = ConnectSpec { psn: first_psn(here, there), ..self.options.connect };
        let connected = seat.connect(&remote, &spec);
        drop(seat);
        if let Err(error) = connected {
            count(&self.counters.link_failures, 1);
            return Err(error);
        }
        count(&self.counters.links, 1);
        match state.registry.derive(snapshot, self.path(), Kind::QueuePair, Derived::Link(slot)) {
            Ok(handle) => {
                self.seat(slot).lock().holder = Some((name.clone(), handle));
                Ok(())
            }
            Err((refusal, _)) => {
                let path = |work: &Work| TransferError::PathRetired { name: work.name.clone() };
                let doomed = self.seat(slot).lock().reset(&self.options.connect, path);
                self.doomed.lock().extend(doomed);
                Err(refusal.into())
            }
        }
    }

    /// One seat's turn.
    fn turn(&self, state: &State, slot: u32, todo: &mut Todo) -> usize {
        let Some(mut seat) = self.seat(slot).try_lock() else { return 0 };
        let mut done = seat.poll(|work| self.check_lease(state, work));
        if seat.has_failed {
            todo.failed.push(slot);
            return done;
        }
        if !seat.is_ready() {
            let pruned = seat.prune(|work| self.check_owner(state, work).err());
            count(&self.counters.refused, pruned as u64);
            let has_greeted = !seat.waiting.is_empty() && seat.greet();
            return done + pruned + usize::from(has_greeted);
        }
        while let Some(work) = seat.waiting.front() {
            match self.resolve(state, work) {
                Ok((handle, remote)) => {
                    let is_newer = handle != work.handle;
                    if !seat.post(remote) {
                        break;
                    }
                    count(&self.counters.posted, 1);
                    count(&self.counters.re_resolved, is_newer.into());
                }
                Err(NotNow::NeedsKey) => {
                    todo.keys.push((slot, work.name.clone(), work.buffer));
                    break;
                }
                Err(NotNow::Never(error)) => {
                    if let Some(work) = seat.waiting.pop_front() {
                        work.end(Err(error));
                    }
                    count(&self.counters.refused, 1);
                }
            }
            done += 1;
        }
        done
    }

    fn check_owner(&self, state: &State, work: &Work) -> Result<(), TransferError> {
        let known = state.registry.known(&work.name);
        if known.is_some_and(|known| owner_of(known) == work.owner) {
            return Ok(());
        }
        Err(TransferError::PeerReplaced { name: work.name.clone() })
    }

    fn check_lease(&self, state: &State, work: &Work) -> Result<(), TransferError> {
        let (identity, fence) = work.owner;
        let lease = state.leases.get(&work.name);
        let lease = lease.filter(|(granted, lease)| *granted == identity && lease.stamp().fence == fence);
        let (_, lease) = lease.ok_or(StoreError::LeaseExpired { fence })?;
        lease.check(self.clock.now())?;
        Ok(())
    }

    /// The key with which a request is to be posted at this moment.
    fn resolve(&self, state: &State, work: &Work) -> Result<(SegmentHandle, RemoteRange), NotNow> {
        if work.op.look(|status| status.outcome.is_some()) {
            return Err(NotNow::Never(TransferError::Cancelled));
        }
        if self.clock.now() >= work.deadline {
            return Err(NotNow::Never(TransferError::Deadline { budget: work.budget }));
        }
        self.check_owner(state, work).map_err(NotNow::Never)?;
        self.check_lease(state, work).map_err(NotNow::Never)?;
        let part = Part::Buffer(work.buffer);
        if let Some((handle, Derived::Remote(remote))) = state.registry.find(&work.name, part, Kind::Rkey) {
            let end = work.remote_offset + u64::from(work.len);
            if end <= remote.len {
                return Ok((handle, *remote));
            }
            let field = "end of the request";
            let error = TransferError::OutOfRange { field, value: end, min: 0, max: remote.len };
            return Err(NotNow::Never(error));
        }
        let is_offered =
            state.registry.known(&work.name).is_some_and(|known| part.fingerprint(&known.record).is_some());
        match is_offered {
            true => Err(NotNow::NeedsKey),
            false => Err(NotNow::Never(TransferError::NotOffered { buffer: work.buffer })),
        }
    }

    /// Takes the keys that are missing, and replaces the queue pairs that failed.
    fn catch_up(&self, todo: Todo) {
        let mut state = self.state.write();
        for (slot, name, buffer) in todo.keys {
            let Some(snapshot) = state.registry.known(&name).cloned() else { continue };
            if let Err(error) = key_of(&mut state, &snapshot, buffer) {
                let mut seat = self.seat(slot).lock();
                let is_it = |work: &Work| work.name == name && work.buffer == buffer;
                seat.prune(|work| is_it(work).then(|| error.clone()));
            }
        }
        for slot in todo.failed {
            self.replace_failed(&mut state, slot);
        }
    }

    /// Gives a failed queue pair's place to a new one; the peer learns its number from the record.
    fn replace_failed(&self, state: &mut State, slot: u32) {
        let mut seat = self.seat(slot).lock();
        if !seat.has_failed {
            return;
        }
        let doomed = seat.destroy(|work| TransferError::PathRetired { name: work.name.clone() });
        self.doomed.lock().extend(doomed);
        let _ = self.offer(&mut seat);
        let holder = seat.holder.take();
        drop(seat);
        let Some((name, handle)) = holder else { return };
        // Stale if its record was overtaken meanwhile, which took it out.
        let _ = state.registry.retire(handle);
        self.failed.lock().insert(name.clone());
        if let Some(snapshot) = state.registry.known(&name).cloned() {
            let _ = self.link(state, &snapshot);
        }
    }

    /// Ends waiting requests that were given an outcome.
    pub(super) fn drop_decided(&self) {
        for seat in &self.seats {
            seat.lock().prune(|_| None);
        }
    }

    /// Ends those of these requests that have not been posted.
    pub(super) fn cancel(&self, ops: &[Arc<Op>]) {
        for seat in &self.seats {
            let is_one = |work: &Work| ops.iter().any(|op| Arc::ptr_eq(op, &work.op));
            seat.lock().prune(|work| is_one(work).then_some(TransferError::Cancelled));
        }
    }
}

impl Observer for Requester {
    fn seen(&self, snapshot: &Arc<Snapshot>) {
        self.observe(&mut self.state.write(), snapshot);
    }

    fn granted(&self, leased: &Leased<Arc<Snapshot>>) {
        self.grant(leased);
    }

    fn ended(&self, name: &RecordName, fence: Fence, released: bool) {
        let mut state = self.state.write();
        let is_known = state.registry.known(name).is_some_and(|known| known.stamp.fence == fence);
        if is_known && released {
            // An expired owner may yet be alive and keeps what it has; it just may not be used meanwhile.
            let retired = state.registry.end(name);
            self.take_down(retired, true);
        }
        if state.leases.get(name).is_some_and(|(_, lease)| lease.stamp().fence == fence) {
            state.leases.remove(name);
        }
    }
}

fn in_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), TransferError> {
    match (min..=max).contains(&value) {
        true => Ok(()),
        false => Err(TransferError::OutOfRange { field, value, min, max }),
    }
}

const fn owner_of(snapshot: &Snapshot) -> (Identity, Fence) {
    (snapshot.identity, snapshot.stamp.fence)
}

/// The key of a buffer, taken from the newest snapshot if it is not there yet.
fn key_of(
    state: &mut State,
    snapshot: &Arc<Snapshot>,
    buffer: BufferId,
) -> Result<SegmentHandle, TransferError> {
    let part = Part::Buffer(buffer);
    if let Some((handle, _)) = state.registry.find(&snapshot.name, part, Kind::Rkey) {
        return Ok(handle);
    }
    let entry = snapshot.record.buffers.iter().find(|entry| entry.buffer_id == buffer);
    let entry = entry.filter(|_| part.fingerprint(&snapshot.record).is_some());
    let entry = entry.ok_or(TransferError::NotOffered { buffer })?;
    let rkey = *entry.keys.first().ok_or_else(|| unreachable_peer(snapshot, "a key of the buffer"))?;
    let remote = Derived::Remote(RemoteRange { addr: entry.addr, len: entry.len, rkey });
    let derived = state.registry.derive(snapshot, part, Kind::Rkey, remote);
    derived.map_err(|(refusal, _)| refusal.into())
}

fn check(request: &Request<'_>, snapshot: &Snapshot) -> Result<(), TransferError> {
    let (segment, len) = (request.segment, u64::from(request.len));
    if segment.name != snapshot.name || segment.owner != owner_of(snapshot) {
        return Err(TransferError::PeerReplaced { name: segment.name.clone() });
    }
    in_range("len", len, 1, LEN_MAX.into())?;
    let room = |total: u64| total.checked_sub(len);
    let local_max = room(request.local.len());
    in_range("len", len, 1, request.local.len().min(segment.len))?;
    in_range("local_offset", request.local_offset, 0, local_max.unwrap_or(0))?;
    in_range("remote_offset", request.remote_offset, 0, room(segment.len).unwrap_or(0))?;
    let (right, verb) = request.verb.right();
    match segment.access.allows(right) {
        true => Ok(()),
        false => Err(TransferError::Denied { buffer: segment.buffer, verb }),
    }
}

fn work(request: &Request<'_>, deadline: Moment, budget: Duration) -> Work {
    let segment = request.segment;
    Work {
        op: Arc::new(Op::default()),
        verb: request.verb,
        name: segment.name.clone(),
        owner: segment.owner,
        buffer: segment.buffer,
        handle: segment.handle,
        remote_offset: request.remote_offset,
        share: request.local.share(),
        local_offset: request.local_offset,
        len: request.len,
        deadline,
        budget,
        wqe_idx: 0,
    }
}
