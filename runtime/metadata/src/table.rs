//! The rules of a store as a pure state machine: who may do what, and what that changes.
//!
//! Owns every row in memory. Knows no clock, no thread and no disk: time comes in as [`Moment`]s, and a
//! change is first planned ([`Table::claim`] and its like, which change nothing), then written down by
//! whoever keeps the table, then applied. So nothing is visible before it is durable.
//!
//! INVARIANTS:
//! - fences, leases and revisions are all drawn from one counter that only grows, so that none is ever
//!   given twice and fences grow per name;
//! - a row outlives its owner: a fence is never forgotten;
//! - `deadlines` holds exactly the rows whose lease is counted as alive.

mod history;
pub(crate) mod rules;

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use self::history::History;
use crate::error::{Result, StoreError};
use crate::ids::{Fence, InstanceId, LeaseId, Revision, Stamp, Version};
use crate::lease::Moment;
use crate::name::{Prefix, RecordName};
use crate::store::{Cell, Change, Event, Filter, Hold, Listed, Page, ReaderState, Snapshot};

/// A store whose keeper was stopped for longer than this between two signs of life counts the stop as an
/// outage: leases get that time back.
const STALL: Duration = Duration::from_secs(1);

/// A change that was found legal, to be written down and then applied.
#[derive(Debug, Clone)]
pub(crate) enum Planned {
    Claim(Box<RowState>),
    Publish { name: RecordName, snapshot: Arc<Snapshot> },
    Release { name: RecordName },
    Ack { name: RecordName, reader: InstanceId, row: ReaderRow },
    Swap { name: RecordName, cell: Arc<Cell> },
}

/// What is written down about a row.
#[derive(Debug, Clone)]
pub(crate) struct RowState {
    pub(crate) hold: Hold,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) released: bool,
}

/// What is written down about a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReaderRow {
    pub(crate) stamp: Stamp,
    pub(crate) ttl: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Until(Moment),
    Expired,
    Released,
}

#[derive(Debug)]
struct Row {
    hold: Hold,
    snapshot: Arc<Snapshot>,
    life: Life,
    readers: BTreeMap<InstanceId, (ReaderRow, Moment)>,
}

/// Everything that a store holds.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: HashMap<RecordName, Row>,
    /// Names of rows that are not released, for listings.
    names: BTreeSet<RecordName>,
    cells: HashMap<RecordName, Arc<Cell>>,
    deadlines: BTreeSet<(Moment, RecordName)>,
    history: History,
    /// The keeper's last sign of life, once it gives any.
    beat: Option<Moment>,
}

impl Table {
    /// A table that continues a history whose last revision was `revision`.
    pub(crate) fn continuing(revision: Revision) -> Self {
        Self { history: History::continuing(revision), ..Self::default() }
    }

    pub(crate) fn revision(&self) -> Revision {
        self.history.newest()
    }

    /// Names that somebody owns.
    pub(crate) fn num_names(&self) -> usize {
        self.names.len()
    }

    /// When the next lease runs out.
    pub(crate) fn next_deadline(&self) -> Option<Moment> {
        self.deadlines.first().map(|(moment, _)| *moment)
    }

    /// Takes a row from disk. Its lease starts anew: nobody could renew it while the store was away.
    pub(crate) fn restore(&mut self, state: RowState, now: Moment) {
        let name = state.hold.name.clone();
        let life = if state.released { Life::Released } else { Life::Until(now.after(state.hold.ttl)) };
        self.insert(name, Row { hold: state.hold, snapshot: state.snapshot, life, readers: BTreeMap::new() });
    }

    /// Takes a reader from disk; `false` if its row is not there.
    pub(crate) fn restore_reader(
        &mut self,
        name: &RecordName,
        reader: InstanceId,
        row: ReaderRow,
        now: Moment,
    ) -> bool {
        let Some(owner) = self.rows.get_mut(name) else { return false };
        owner.readers.insert(reader, (row, now.after(row.ttl)));
        true
    }

    /// Takes a cell from disk.
    pub(crate) fn restore_cell(&mut self, name: RecordName, cell: Cell) {
        self.cells.insert(name, Arc::new(cell));
    }

    fn insert(&mut self, name: RecordName, row: Row) {
        if let Life::Until(deadline) = row.life {
            self.deadlines.insert((deadline, name.clone()));
        }
        if row.life == Life::Released {
            self.names.remove(&name);
        } else {
            self.names.insert(name.clone());
        }
        self.rows.insert(name, row);
    }

    /// A sign of life of whoever keeps the table, to be given several times per second. Tables whose
    /// keeper gives none take every silence for idleness.
    pub(crate) fn beat(&mut self, now: Moment) {
        self.observe(now);
        self.beat = Some(now);
    }

    /// Lets time pass: forgives a stall, then expires what ran out. To be called before every rule.
    pub(crate) fn observe(&mut self, now: Moment) {
        if let Some(beat) = self.beat
            && now.since(beat) > STALL
        {
            self.forgive(now.since(beat));
            self.beat = Some(now);
        }
        while let Some((deadline, name)) = self.deadlines.first().cloned() {
            if deadline > now {
                break;
            }
            self.deadlines.pop_first();
            if let Some(row) = self.rows.get_mut(&name) {
                row.life = Life::Expired;
                let fence = row.hold.fence;
                self.history.push(Change::Expired { name, fence });
            }
        }
    }

    /// Whether [`Table::observe`] would change anything.
    pub(crate) fn is_due(&self, now: Moment) -> bool {
        self.next_deadline().is_some_and(|deadline| deadline <= now)
            || self.beat.is_some_and(|beat| now.since(beat) > STALL)
    }

    /// Gives every living lease, owners' and readers', time back.
    fn forgive(&mut self, stall: Duration) {
        self.deadlines.clear();
        for (name, row) in &mut self.rows {
            if let Life::Until(deadline) = &mut row.life {
                *deadline = deadline.after(stall);
                self.deadlines.insert((*deadline, name.clone()));
            }
            for (_, until) in row.readers.values_mut() {
                *until = until.after(stall);
            }
        }
    }

    /// Puts a planned change into effect.
    pub(crate) fn apply(&mut self, planned: Planned, now: Moment) -> Revision {
        match planned {
            Planned::Claim(state) => self.apply_claim(*state, now),
            Planned::Publish { name, snapshot } => {
                if let Some(row) = self.rows.get_mut(&name) {
                    row.snapshot = Arc::clone(&snapshot);
                }
                self.history.push(Change::Put(snapshot))
            }
            Planned::Release { name } => self.apply_release(name),
            Planned::Ack { name, reader, row } => {
                if let Some(owner) = self.rows.get_mut(&name) {
                    owner.readers.retain(|_, (_, until)| *until > now);
                    owner.readers.insert(reader, (row, now.after(row.ttl)));
                }
                self.revision()
            }
            Planned::Swap { name, cell } => {
                let version = cell.version;
                self.cells.insert(name.clone(), cell);
                self.history.push(Change::Cell { name, version })
            }
        }
    }

    fn apply_claim(&mut self, state: RowState, now: Moment) -> Revision {
        let name = state.hold.name.clone();
        let before = self.rows.remove(&name);
        if let Some(Row { life: Life::Until(deadline), .. }) = before {
            self.deadlines.remove(&(deadline, name.clone()));
        }
        let readers = before.map(|row| row.readers).unwrap_or_default();
        let life = Life::Until(now.after(state.hold.ttl));
        let snapshot = Arc::clone(&state.snapshot);
        self.insert(name, Row { hold: state.hold, snapshot: state.snapshot, life, readers });
        self.history.push(Change::Put(snapshot))
    }

    fn apply_release(&mut self, name: RecordName) -> Revision {
        let Some(row) = self.rows.get_mut(&name) else { return self.revision() };
        if let Life::Until(deadline) = row.life {
            self.deadlines.remove(&(deadline, name.clone()));
        }
        row.life = Life::Released;
        let fence = row.hold.fence;
        self.names.remove(&name);
        self.history.push(Change::Released { name, fence })
    }

    /// Starts a lease anew. Touches nothing that is written down.
    pub(crate) fn renew(&mut self, hold: &Hold, now: Moment) -> Result<()> {
        let row = self.rows.get_mut(&hold.name).ok_or(StoreError::NotFound)?;
        rules::check_hold(row, hold, now)?;
        if let Life::Until(deadline) = row.life {
            self.deadlines.remove(&(deadline, hold.name.clone()));
        }
        let deadline = now.after(row.hold.ttl);
        row.life = Life::Until(deadline);
        self.deadlines.insert((deadline, hold.name.clone()));
        Ok(())
    }

    /// One outcome of a batch: the snapshot, and what remains of its owner's lease.
    pub(crate) fn get(&self, name: &RecordName, now: Moment) -> Result<(Arc<Snapshot>, Duration)> {
        let row = self.rows.get(name).filter(|row| row.life != Life::Released);
        let row = row.ok_or(StoreError::NotFound)?;
        match row.life {
            Life::Until(deadline) if deadline > now => Ok((Arc::clone(&row.snapshot), deadline.since(now))),
            _ => Err(StoreError::LeaseExpired { fence: row.hold.fence }),
        }
    }

    pub(crate) fn list(&self, filter: &Filter, now: Moment) -> Page {
        let mut page = Page { revision: self.revision(), ..Page::default() };
        let start = filter.after.clone().map_or(Bound::Unbounded, Bound::Excluded);
        let under = self.names.range((start, Bound::Unbounded)).filter(|name| filter.prefix.covers(name));
        for name in under {
            if page.entries.len() == filter.limit {
                page.next = page.entries.last().map(|entry| entry.snapshot.name.clone());
                break;
            }
            let Some(row) = self.rows.get(name) else { continue };
            let remaining = match row.life {
                Life::Until(deadline) if deadline > now => Some(deadline.since(now)),
                _ => None,
            };
            page.entries.push(Listed { snapshot: Arc::clone(&row.snapshot), remaining });
        }
        page
    }

    /// Events under a prefix after `from`, at most `limit`, and the revision up to which that looked.
    pub(crate) fn events(&self, prefix: &Prefix, from: Revision, limit: usize) -> (Vec<Event>, Revision) {
        self.history.events(prefix, from, limit)
    }

    pub(crate) fn readers(&self, name: &RecordName, now: Moment) -> Result<Vec<ReaderState>> {
        let row = self.rows.get(name).ok_or(StoreError::NotFound)?;
        let alive = row.readers.iter().filter(|(_, (_, until))| *until > now);
        let state = |(reader, (row, until)): (&InstanceId, &(ReaderRow, Moment))| ReaderState {
            reader: *reader,
            stamp: row.stamp,
            remaining: until.since(now),
        };
        Ok(alive.map(state).collect())
    }

    pub(crate) fn cell(&self, name: &RecordName) -> Result<Cell> {
        self.cells.get(name).map(|cell| Cell::clone(cell)).ok_or(StoreError::NotFound)
    }

    /// The row as it stands after a planned change, to be written down; `None` if rows do not change.
    pub(crate) fn row_after(&self, planned: &Planned) -> Option<RowState> {
        let current = |name: &RecordName| {
            let row = self.rows.get(name)?;
            let released = row.life == Life::Released;
            Some(RowState { hold: row.hold.clone(), snapshot: Arc::clone(&row.snapshot), released })
        };
        match planned {
            Planned::Claim(state) => Some(RowState::clone(state)),
            Planned::Publish { name, snapshot } => {
                Some(RowState { snapshot: Arc::clone(snapshot), ..current(name)? })
            }
            Planned::Release { name } => Some(RowState { released: true, ..current(name)? }),
            Planned::Ack { .. } | Planned::Swap { .. } => None,
        }
    }

    /// The readers of a row as they stand after a planned ack, to be written down; those that ran out
    /// are left out.
    pub(crate) fn readers_after(
        &self,
        name: &RecordName,
        acked: (InstanceId, ReaderRow),
        now: Moment,
    ) -> Vec<(InstanceId, ReaderRow)> {
        let row = self.rows.get(name);
        let before = row.into_iter().flat_map(|row| &row.readers);
        let alive = before.filter(|(reader, (_, until))| *until > now && **reader != acked.0);
        alive.map(|(reader, (row, _))| (*reader, *row)).chain([acked]).collect()
    }

    fn next_number(&self) -> u64 {
        self.revision().0.saturating_add(1)
    }

    fn next_hold(&self, name: &RecordName, instance: InstanceId, ttl: Duration) -> Hold {
        let number = self.next_number();
        Hold { name: name.clone(), instance, fence: Fence(number), lease: LeaseId(number), ttl }
    }
}

impl Version {
    /// The version after this one; `None` past the last.
    pub(crate) fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::rules::Claimed;
    use super::*;
    use crate::store::{Ack, Claim};

    const TTL: Duration = Duration::from_secs(10);

    fn second(second: u64) -> Moment {
        Moment(second * 1_000_000_000)
    }

    /// A table with one owner and one reader from second 1 on, whose keeper has given a sign of life.
    fn kept() -> (Table, Hold) {
        let (mut table, now) = (Table::default(), second(1));
        let (name, instance) = (RecordName::parse("c/g/a").unwrap(), InstanceId::new(1).unwrap());
        let claim = Claim { name, instance, ttl: TTL, takeover: false };
        let Claimed::Anew(hold, planned) = table.claim(&claim, now).unwrap() else { panic!("held") };
        table.apply(planned, now);
        let stamp = Stamp::new(hold.fence, Version(0));
        let ack = Ack { name: hold.name.clone(), reader: InstanceId::new(2).unwrap(), stamp, ttl: TTL };
        let (planned, _) = table.ack(&ack, now).unwrap();
        table.apply(planned, now);
        table.beat(now);
        (table, hold)
    }

    #[test]
    fn a_stall_of_the_keeper_counts_against_nobodys_lease() {
        let (mut table, hold) = kept();
        // Away for a minute: whoever wanted to renew could not.
        let back = second(61);
        table.observe(back);
        let (_, remaining) = table.get(&hold.name, back).unwrap();
        assert_eq!(remaining, TTL, "the minute is given back, and no more");
        assert_eq!(table.readers(&hold.name, back).unwrap().len(), 1, "to readers too");
        table.beat(back);
        // Alive from here on: silence is evidence again.
        for now in 62..=71 {
            table.beat(second(now));
        }
        let over = table.get(&hold.name, second(71));
        assert_eq!(over.map(|_| ()), Err(StoreError::LeaseExpired { fence: hold.fence }));
        assert!(table.readers(&hold.name, second(71)).unwrap().is_empty());
    }

    #[test]
    fn a_short_pause_is_not_forgiven() {
        let (mut table, hold) = kept();
        for now in 2..=11 {
            table.beat(second(now));
        }
        assert!(table.get(&hold.name, second(11)).is_err(), "ten pauses of a second are ten seconds");
    }
}
