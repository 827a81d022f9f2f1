//! The task of a [`super::StoreBoard`]: away, or there.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::collections::HashMap;
use std::sync::Arc;

use ibex_metadata::backoff::Backoff;
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::{Clock, within};
use ibex_metadata::error::{Result, StoreError};
use ibex_metadata::ids::{Fence, Version};
use ibex_metadata::keeper::Keeping;
use ibex_metadata::limits::PAGE_LEN_MAX;
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::publisher::Publisher;
use ibex_metadata::record::Identity;
use ibex_metadata::store::{Cell, Change, Filter, Snapshot, Store, Watch};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{BoardClaim, GroupName, Shared, Whereabouts};
use crate::ids::Rank;
use crate::membership::{BoardEvent, Claimed, Instance};

/// Longest wait for one answer before the store counts as away.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// A store that has nothing to tell is asked for its health this often.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// First pause between two attempts to reach a store that is away.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// Longest such pause.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Placements kept: a group never looks further back than the one before a switch.
const PLACEMENTS_KEPT: u32 = 4;
/// Changes that wait to be told.
const CHANGES_MAX: usize = 64;
/// Attempts to write a cell that somebody else keeps writing.
const WRITES_MAX: u32 = 8;

/// A name of the group, by what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    View,
    Row(Rank),
    Offers(Rank),
    Placement(u32),
    Name(Rank),
}

impl Place {
    fn parse(last: &str) -> Option<Self> {
        let number = |prefix| last.strip_prefix(prefix)?.strip_prefix('-')?.parse::<u16>().ok();
        if last == "view" {
            return Some(Self::View);
        }
        number("row")
            .map(|rank| Self::Row(Rank(rank)))
            .or_else(|| number("offers").map(|rank| Self::Offers(Rank(rank))))
            .or_else(|| number("placement").map(|slot| Self::Placement(slot.into())))
            .or_else(|| number("rank").map(|rank| Self::Name(Rank(rank))))
    }

    fn text(self) -> String {
        match self {
            Self::View => "view".into(),
            Self::Row(rank) => format!("row-{}", rank.0),
            Self::Offers(rank) => format!("offers-{}", rank.0),
            Self::Placement(slot) => format!("placement-{slot}"),
            Self::Name(rank) => super::rank_name(rank),
        }
    }
}

/// Changes of a watch, through a task of their own: waiting for the next may be given up without losing one.
struct Changes {
    received: mpsc::Receiver<Result<Change>>,
    task: JoinHandle<()>,
}

impl Changes {
    fn follow(mut watch: Watch) -> Self {
        let (sender, received) = mpsc::channel(CHANGES_MAX);
        let task = tokio::spawn(async move {
            loop {
                let change = watch.next().await.map(|event| event.change);
                let is_over = change.is_err();
                if sender.send(change).await.is_err() || is_over {
                    return;
                }
            }
        });
        Self { received, task }
    }

    async fn next(&mut self) -> Result<Change> {
        let gone = StoreError::Unavailable { retry_after: FIRST_PAUSE };
        self.received.recv().await.unwrap_or(Err(gone))
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// See the module documentation.
pub(super) struct Task {
    shared: Arc<Shared>,
    store: Arc<dyn Store>,
    clock: Clock,
    group: GroupName,
    prefix: Prefix,
    num_ranks: u32,
    claimed: Claimed,
    /// Who held each name when it was last seen: an expiry names the fence only.
    holders: HashMap<Rank, Claimed>,
    /// Of the cells that this task writes.
    versions: HashMap<String, Version>,
    publisher: Arc<Publisher>,
}

impl Task {
    pub(super) fn new(
        shared: Arc<Shared>,
        store: &Blocking,
        prefix: Prefix,
        what: &BoardClaim,
        claimed: Claimed,
        publisher: Arc<Publisher>,
    ) -> Self {
        Self {
            shared,
            store: Arc::clone(store.store()),
            clock: store.clock().clone(),
            group: what.group.clone(),
            prefix,
            num_ranks: what.num_ranks,
            claimed,
            holders: HashMap::new(),
            versions: HashMap::new(),
            publisher,
        }
    }

    /// Runs until the board is dropped.
    pub(super) async fn run(mut self, mut lease: watch::Receiver<Keeping>) {
        // CAST: the low half of a random number.
        let mut backoff = Backoff::new(FIRST_PAUSE, PAUSE_MAX, self.claimed.instance.0 as u64);
        let mut was_there = true;
        while !self.is_over() {
            let Err(error) = self.attend(&mut lease, &mut backoff, &mut was_there).await else { return };
            *self.shared.trouble.lock() = Some(error);
            if was_there {
                self.shared.tell(BoardEvent::Unavailable);
                // An answer that never came is not told: the view says what became of it.
                self.shared.wishes.lock().cas = None;
                was_there = false;
            }
            self.clock.sleep_until(self.clock.now().after(backoff.pause())).await;
        }
    }

    fn is_over(&self) -> bool {
        self.shared.is_over.load(Ordering::Acquire)
    }

    /// Serves the board for as long as the store answers; `Ok` once the board is gone.
    async fn attend(
        &mut self,
        lease: &mut watch::Receiver<Keeping>,
        backoff: &mut Backoff,
        was_there: &mut bool,
    ) -> Result<()> {
        let health = within(ANSWER_MAX, self.store.health()).await?;
        // Before anything is read, so that nothing falls between.
        let watch = within(ANSWER_MAX, self.store.watch(&self.prefix, health.revision)).await?;
        let mut changes = Changes::follow(watch);
        // CAST: 584 years.
        self.shared.tell(BoardEvent::Available { up_for_ns: health.up_for.as_nanos() as u64 });
        *was_there = true;
        *self.shared.trouble.lock() = None;
        self.tell_all().await?;
        self.tell_own(lease);
        backoff.reset();
        while !self.is_over() {
            self.carry_out().await?;
            let probe_at = self.clock.now().after(PROBE_EVERY);
            tokio::select! {
                change = changes.next() => self.tell_change(change?).await?,
                () = self.shared.wished.notified() => {}
                changed = lease.changed() => {
                    if changed.is_err() {
                        // The board gave the name back and is about to go.
                        self.clock.sleep_until(probe_at).await;
                    }
                    self.tell_own(lease);
                }
                () = self.clock.sleep_until(probe_at) => {
                    within(ANSWER_MAX, self.store.health()).await?;
                }
            }
        }
        Ok(())
    }

    /// Tells that the own name is lost, if it is.
    fn tell_own(&self, lease: &watch::Receiver<Keeping>) {
        if lease.borrow().lost.is_some() {
            self.shared.tell(BoardEvent::Claim { claim: self.claimed, is_alive: false });
        }
    }

    fn name(&self, place: Place) -> Result<RecordName> {
        self.group.name(&place.text())
    }

    fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        // CAST: at most 512 ranks.
        (0..self.num_ranks as u16).map(Rank)
    }

    /// Everything that the store holds: names, rows, offers, placements, and the view last.
    async fn tell_all(&mut self) -> Result<()> {
        let mut filter = Filter { prefix: self.prefix.clone(), after: None, limit: PAGE_LEN_MAX };
        loop {
            let page = within(ANSWER_MAX, self.store.list(&filter)).await?;
            for entry in page.entries {
                self.tell_holder(&entry.snapshot, entry.remaining.is_some());
            }
            filter.after = page.next;
            if filter.after.is_none() {
                break;
            }
        }
        for rank in self.ranks() {
            self.tell_cell(Place::Row(rank)).await?;
            self.tell_cell(Place::Offers(rank)).await?;
        }
        for slot in 0..PLACEMENTS_KEPT {
            self.tell_cell(Place::Placement(slot)).await?;
        }
        if !self.tell_cell(Place::View).await? {
            self.shared.tell(BoardEvent::View { version: 0, bytes: Vec::new() });
        }
        Ok(())
    }

    fn tell_holder(&mut self, snapshot: &Arc<Snapshot>, is_alive: bool) {
        let Some(Place::Name(rank)) = Place::parse(snapshot.name.parts().2) else { return };
        let Identity::Instance(instance) = snapshot.identity else { return };
        let instance = Instance(u128::from_be_bytes(instance.to_bytes()));
        let claim = Claimed { rank, instance, fence: snapshot.stamp.fence.0 };
        self.holders.insert(rank, claim);
        if rank != self.claimed.rank {
            self.shared.records.lock().insert(rank, Arc::clone(snapshot));
        }
        self.shared.tell(BoardEvent::Claim { claim, is_alive });
    }

    fn tell_gone(&self, name: &RecordName, fence: Fence) {
        let Some(Place::Name(rank)) = Place::parse(name.parts().2) else { return };
        // Somebody who came after is not gone.
        if let Some(&claim) = self.holders.get(&rank).filter(|claim| claim.fence == fence.0) {
            self.shared.tell(BoardEvent::Claim { claim, is_alive: false });
        }
    }

    async fn tell_change(&mut self, change: Change) -> Result<()> {
        match change {
            Change::Put(snapshot) => self.tell_holder(&snapshot, true),
            Change::Expired { name, fence } | Change::Released { name, fence } => {
                self.tell_gone(&name, fence);
            }
            Change::Cell { name, version } => {
                let last = name.parts().2;
                if self.versions.get(last).is_some_and(|own| *own >= version) {
                    return Ok(());
                }
                if let Some(place) = Place::parse(last) {
                    self.tell_cell(place).await?;
                }
            }
            Change::Gap => self.tell_all().await?,
        }
        Ok(())
    }

    async fn read(&self, place: Place) -> Result<Option<Cell>> {
        match within(ANSWER_MAX, self.store.read_cell(&self.name(place)?)).await {
            Ok(cell) => Ok(Some(cell)),
            Err(StoreError::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Tells what a cell holds; whether it holds anything.
    async fn tell_cell(&mut self, place: Place) -> Result<bool> {
        let Some(Cell { version, value: bytes }) = self.read(place).await? else { return Ok(false) };
        let own = self.claimed.rank;
        match place {
            Place::View => self.shared.tell(BoardEvent::View { version: version.0, bytes }),
            Place::Row(rank) if rank == own => self.own_cell_has(place, version, &bytes),
            Place::Offers(rank) if rank == own => self.own_cell_has(place, version, &bytes),
            Place::Row(from) => self.shared.tell(BoardEvent::Row { from, bytes }),
            Place::Offers(from) => self.shared.tell(BoardEvent::Offers { from, bytes }),
            Place::Placement(_) => {
                if let Some((version, bytes)) = bytes.split_first_chunk::<4>() {
                    let version = u32::from_le_bytes(*version);
                    self.shared.tell(BoardEvent::Placement { version, bytes: bytes.to_vec() });
                }
            }
            Place::Name(_) => {}
        }
        Ok(true)
    }

    /// What stands in a cell of our own: if somebody else wrote it, ours is written again.
    fn own_cell_has(&mut self, place: Place, version: Version, bytes: &[u8]) {
        self.versions.insert(place.text(), version);
        let mut wishes = self.shared.wishes.lock();
        let pinned = if matches!(place, Place::Row(_)) { &mut wishes.row } else { &mut wishes.offers };
        pinned.written(bytes);
    }

    /// Writes what is pinned. The compare-and-set comes last: it may name a placement.
    async fn carry_out(&mut self) -> Result<()> {
        let own = self.claimed.rank;
        loop {
            let (whereabouts, offers, row, placement, cas) = {
                let wishes = self.shared.wishes.lock();
                let placement = wishes.placements.first().cloned();
                let (offers, row) = (wishes.offers.to_write(), wishes.row.to_write());
                (wishes.whereabouts.clone(), offers, row, placement, wishes.cas.clone())
            };
            // Before the offers, which peers take up only beside it.
            if let Some(whereabouts) = whereabouts {
                self.publish(&whereabouts).await?;
                self.shared.wishes.lock().whereabouts.take_if(|newest| *newest == whereabouts);
            } else if let Some(bytes) = offers {
                self.write(Place::Offers(own), &bytes).await?;
                self.shared.wishes.lock().offers.written(&bytes);
            } else if let Some(bytes) = row {
                self.write(Place::Row(own), &bytes).await?;
                self.shared.wishes.lock().row.written(&bytes);
            } else if let Some((version, bytes)) = placement {
                self.write_placement(version, &bytes).await?;
                self.shared.wishes.lock().placements.retain(|(pinned, _)| *pinned != version);
            } else if let Some((expect, bytes)) = cas {
                self.swap_view(expect, bytes).await?;
            } else {
                return Ok(());
            }
        }
    }

    /// Says in the own record how this rank is reached.
    async fn publish(&self, whereabouts: &Whereabouts) -> Result<()> {
        let published = self.publisher.update(|record| whereabouts.describe(record));
        match within(ANSWER_MAX, published).await {
            Err(error) if error.is_transient() => Err(error),
            // The name is lost, which the lease's keeper tells; nothing else refuses a record that we made.
            Err(error) => {
                *self.shared.trouble.lock() = Some(error);
                Ok(())
            }
            Ok(_) => Ok(()),
        }
    }

    /// Writes a cell whose only writer we are, but for an older incarnation.
    async fn write(&mut self, place: Place, bytes: &[u8]) -> Result<()> {
        let name = self.name(place)?;
        let mut expect = self.versions.get(&place.text()).copied().unwrap_or_default();
        for _ in 0..WRITES_MAX {
            match within(ANSWER_MAX, self.store.swap_cell(&name, expect, bytes)).await {
                Ok(version) => {
                    self.versions.insert(place.text(), version);
                    return Ok(());
                }
                Err(StoreError::Conflict { current }) => expect = current,
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::Conflict { current: expect })
    }

    /// Several ranks may pin one placement: the same bytes under the same version.
    async fn write_placement(&mut self, version: u32, bytes: &[u8]) -> Result<()> {
        let place = Place::Placement(version % PLACEMENTS_KEPT);
        for _ in 0..WRITES_MAX {
            let cell = self.read(place).await?;
            let held = cell.as_ref().and_then(|cell| cell.value.first_chunk::<4>());
            if held.is_some_and(|held| u32::from_le_bytes(*held) >= version) {
                return Ok(());
            }
            let expect = cell.map_or(Version(0), |cell| cell.version);
            let value = [&version.to_le_bytes()[..], bytes].concat();
            match within(ANSWER_MAX, self.store.swap_cell(&self.name(place)?, expect, &value)).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn swap_view(&mut self, expect: u64, bytes: Vec<u8>) -> Result<()> {
        let name = self.name(Place::View)?;
        let is_done = match within(ANSWER_MAX, self.store.swap_cell(&name, Version(expect), &bytes)).await {
            Ok(version) => {
                self.shared.tell(BoardEvent::View { version: version.0, bytes: bytes.clone() });
                true
            }
            Err(StoreError::Conflict { .. }) => false,
            Err(error) => return Err(error),
        };
        self.shared.wishes.lock().cas.take_if(|(of, view)| *of == expect && *view == bytes);
        self.shared.tell(BoardEvent::ViewCas { expect, is_done });
        Ok(())
    }
}
