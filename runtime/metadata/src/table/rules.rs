//! Who may do what: each rule looks, refuses or plans, and changes nothing.

use std::sync::Arc;

use super::{Life, Planned, ReaderRow, Row, RowState, Table};
use crate::error::{Bounded, Corruption, DecodeError, Part, Problem, Result, StoreError};
use crate::ids::{Stamp, Version};
use crate::lease::Moment;
use crate::limits::{CELL_LEN_MAX, NAMES_MAX, READERS_MAX};
use crate::name::RecordName;
use crate::record::{Identity, PeerRecord};
use crate::store::{Ack, Cell, Claim, Hold, Snapshot, check_count, check_ttl};

/// What a claim comes to.
#[derive(Debug)]
pub(crate) enum Claimed {
    /// The claimant holds the name already; its lease is to be renewed.
    Again(Hold),
    /// A new hold, to be written down.
    Anew(Hold, Planned),
}

/// The hold must be the present one, and alive. The fence decides first: who is fenced must not believe
/// that renewing would help.
pub(super) fn check_hold(row: &Row, hold: &Hold, now: Moment) -> Result<()> {
    let fence = row.hold.fence;
    if hold.fence != fence {
        return Err(StoreError::Fenced { current: fence });
    }
    let alive = matches!(row.life, Life::Until(deadline) if deadline > now);
    if !alive || hold.lease != row.hold.lease || hold.instance != row.hold.instance {
        return Err(StoreError::LeaseExpired { fence });
    }
    Ok(())
}

impl Table {
    pub(crate) fn claim(&self, claim: &Claim, now: Moment) -> Result<Claimed> {
        check_ttl(claim.ttl)?;
        match self.rows.get(&claim.name) {
            Some(row) => {
                if let Life::Until(deadline) = row.life
                    && deadline > now
                {
                    if row.hold.instance == claim.instance {
                        return Ok(Claimed::Again(row.hold.clone()));
                    }
                    if !claim.takeover {
                        let remaining = deadline.since(now);
                        return Err(StoreError::Held { fence: row.hold.fence, remaining });
                    }
                }
            }
            None => check_count(Bounded::Names, self.rows.len() + 1, NAMES_MAX)?,
        }
        let hold = self.next_hold(&claim.name, claim.instance, claim.ttl);
        let snapshot = Arc::new(Snapshot::claimed(&claim.name, hold.fence, claim.instance));
        let state = RowState { hold: hold.clone(), snapshot, released: false };
        Ok(Claimed::Anew(hold, Planned::Claim(Box::new(state))))
    }

    /// Plans the publication of bytes that the caller has: they are decoded, checked and kept verbatim.
    pub(crate) fn publish(
        &self,
        hold: &Hold,
        expect: Version,
        encoded: Vec<u8>,
        now: Moment,
    ) -> Result<(Version, Planned)> {
        let row = self.rows.get(&hold.name).ok_or(StoreError::NotFound)?;
        check_hold(row, hold, now)?;
        let current = row.snapshot.stamp.version;
        if expect != current {
            return Err(StoreError::Conflict { current });
        }
        let version = next_version(current)?;
        let record = PeerRecord::decode(&encoded)?;
        check_owner(&record, hold)?;
        let snapshot = Snapshot {
            name: hold.name.clone(),
            stamp: Stamp::new(hold.fence, version),
            identity: record.identity,
            record,
            encoded,
        };
        Ok((version, Planned::Publish { name: hold.name.clone(), snapshot: Arc::new(snapshot) }))
    }

    pub(crate) fn release(&self, hold: &Hold, now: Moment) -> Result<Planned> {
        let row = self.rows.get(&hold.name).ok_or(StoreError::NotFound)?;
        check_hold(row, hold, now)?;
        Ok(Planned::Release { name: hold.name.clone() })
    }

    /// Plans an ack; `true` if it changes what is written down, and not only how long it holds.
    pub(crate) fn ack(&self, ack: &Ack, now: Moment) -> Result<(Planned, bool)> {
        check_ttl(ack.ttl)?;
        let row = self.rows.get(&ack.name).filter(|row| row.life != Life::Released);
        let row = row.ok_or(StoreError::NotFound)?;
        let current = row.snapshot.stamp;
        if ack.stamp > current {
            return Err(StoreError::Conflict { current: current.version });
        }
        let before = row.readers.get(&ack.reader);
        if before.is_none() {
            let alive = row.readers.values().filter(|(_, until)| *until > now).count();
            check_count(Bounded::Readers, alive + 1, READERS_MAX)?;
        }
        // An ack that was overtaken by a newer one takes nothing back.
        let stamp = before.map_or(ack.stamp, |(before, _)| before.stamp.max(ack.stamp));
        let reader = ReaderRow { stamp, ttl: ack.ttl };
        let is_new = before.is_none_or(|(before, _)| *before != reader);
        Ok((Planned::Ack { name: ack.name.clone(), reader: ack.reader, row: reader }, is_new))
    }

    pub(crate) fn swap(
        &self,
        name: &RecordName,
        expect: Version,
        value: &[u8],
    ) -> Result<(Version, Planned)> {
        check_count(Bounded::Cell, value.len(), CELL_LEN_MAX)?;
        let current = self.cells.get(name).map_or(Version(0), |cell| cell.version);
        if expect != current {
            return Err(StoreError::Conflict { current });
        }
        if current == Version(0) {
            check_count(Bounded::Names, self.cells.len() + 1, NAMES_MAX)?;
        }
        let version = next_version(current)?;
        let cell = Arc::new(Cell { version, value: value.to_vec() });
        Ok((version, Planned::Swap { name: name.clone(), cell }))
    }
}

fn next_version(current: Version) -> Result<Version> {
    let too_large = StoreError::TooLarge { what: Bounded::Versions, len: u64::MAX, limit: u64::MAX };
    current.next().ok_or(too_large)
}

/// A record says under which name and for whom it is: what says otherwise is not stored.
pub(crate) fn check_owner(record: &PeerRecord, hold: &Hold) -> Result<()> {
    let fail = |field| {
        let error = DecodeError { part: Part::Record, field, problem: Problem::Mismatch };
        Err(StoreError::Corrupt(Corruption::Record(error)))
    };
    if record.key()? != hold.name {
        return fail(5);
    }
    // Who holds a name may publish for a legacy peer, but not as another process.
    match record.identity {
        Identity::Instance(instance) if instance != hold.instance => fail(6),
        Identity::Instance(_) | Identity::Legacy => Ok(()),
    }
}
