//! The rows of a [`Table`] in a redb file: written before they are visible, read once on opening.
//!
//! Owns the file; redb locks it, so that one process has it at a time. Every change is one transaction,
//! durable when [`Journal::write`] returns. Lease deadlines are not written: on opening every lease runs
//! for its full length again, because nobody could renew while the store was away.
//!
//! INVARIANT: revisions are never given twice, although expiries are not written down: every opening
//! starts a new block of [`REVISION_BLOCK`] revisions.

use core::time::Duration;
use std::path::Path;
use std::sync::Arc;

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use crate::error::{Corruption, DecodeError, Feature, Part, Result, StoreError};
use crate::ids::{Fence, InstanceId, LeaseId, Revision, Stamp, Version};
use crate::lease::Moment;
use crate::limits::RECORD_LEN_MAX;
use crate::name::RecordName;
use crate::record::Identity;
use crate::store::{Cell, Hold, Snapshot};
use crate::table::{Planned, ReaderRow, RowState, Table};
use crate::wire::{self, Field, Message, UnknownFields, Writer};

const ROWS: TableDefinition<&str, &[u8]> = TableDefinition::new("rows");
const READERS: TableDefinition<&str, &[u8]> = TableDefinition::new("readers");
const CELLS: TableDefinition<&str, (u64, &[u8])> = TableDefinition::new("cells");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const FORMAT: &str = "format";
const REVISION: &str = "revision";
/// What this build writes.
const FORMAT_HERE: u64 = 1;
/// Revisions of one opening: more than any store lives to see.
const REVISION_BLOCK: u64 = 1 << 32;
/// When to try a file again that another process has, or a disk that failed.
const RETRY: Duration = Duration::from_secs(1);

/// The file of an embedded store.
#[derive(Debug)]
pub(crate) struct Journal {
    database: Database,
}

impl Journal {
    /// Opens or creates the file, and reads it.
    pub(crate) fn open(path: &Path, now: Moment) -> Result<(Self, Table)> {
        let database = Database::create(path).map_err(open_error)?;
        let journal = Self { database };
        let table = journal.read(now)?;
        Ok((journal, table))
    }

    fn read(&self, now: Moment) -> Result<Table> {
        let transaction = self.database.begin_write().map_err(failed)?;
        let table = {
            let mut meta = transaction.open_table(META).map_err(failed)?;
            let format = meta.get(FORMAT).map_err(failed)?.map_or(FORMAT_HERE, |value| value.value());
            if format != FORMAT_HERE {
                return Err(StoreError::Unsupported(Feature::Schema));
            }
            let before = meta.get(REVISION).map_err(failed)?.map_or(0, |value| value.value());
            let revision = (before / REVISION_BLOCK + 1).saturating_mul(REVISION_BLOCK);
            meta.insert(FORMAT, FORMAT_HERE).map_err(failed)?;
            meta.insert(REVISION, revision).map_err(failed)?;
            let mut table = Table::continuing(Revision(revision));
            read_rows(&transaction, &mut table, now)?;
            read_readers(&transaction, &mut table, now)?;
            read_cells(&transaction, &mut table)?;
            table
        };
        transaction.commit().map_err(failed)?;
        Ok(table)
    }

    /// Writes down one planned change; durable on return.
    pub(crate) fn write(&self, table: &Table, planned: &Planned, now: Moment) -> Result<()> {
        let transaction = self.database.begin_write().map_err(failed)?;
        write_planned(&transaction, table, planned, now)?;
        {
            let mut meta = transaction.open_table(META).map_err(failed)?;
            meta.insert(REVISION, table.revision().0.saturating_add(1)).map_err(failed)?;
        }
        transaction.commit().map_err(failed)
    }

    /// Whether the file can still be read.
    pub(crate) fn probe(&self) -> Result<()> {
        self.database.begin_read().map(drop).map_err(failed)
    }
}

fn write_planned(
    transaction: &WriteTransaction,
    table: &Table,
    planned: &Planned,
    now: Moment,
) -> Result<()> {
    if let Some(state) = table.row_after(planned) {
        let mut rows = transaction.open_table(ROWS).map_err(failed)?;
        let bytes = wire::encode(&StoredRow::from(&state));
        rows.insert(state.hold.name.as_str(), bytes.as_slice()).map_err(failed)?;
    }
    match planned {
        Planned::Ack { name, reader, row } => {
            let mut readers = transaction.open_table(READERS).map_err(failed)?;
            let list = StoredReaders::from(table.readers_after(name, (*reader, *row), now));
            readers.insert(name.as_str(), wire::encode(&list).as_slice()).map_err(failed)?;
        }
        Planned::Swap { name, cell } => {
            let mut cells = transaction.open_table(CELLS).map_err(failed)?;
            cells.insert(name.as_str(), (cell.version.0, cell.value.as_slice())).map_err(failed)?;
        }
        Planned::Claim(_) | Planned::Publish { .. } | Planned::Release { .. } => {}
    }
    Ok(())
}

fn read_rows(transaction: &WriteTransaction, table: &mut Table, now: Moment) -> Result<()> {
    let rows = transaction.open_table(ROWS).map_err(failed)?;
    for entry in rows.iter().map_err(failed)? {
        let (name, bytes) = entry.map_err(failed)?;
        let row: StoredRow = wire::decode(bytes.value())?;
        table.restore(row.into_state(stored_name(name.value())?)?, now);
    }
    Ok(())
}

fn read_readers(transaction: &WriteTransaction, table: &mut Table, now: Moment) -> Result<()> {
    let readers = transaction.open_table(READERS).map_err(failed)?;
    for entry in readers.iter().map_err(failed)? {
        let (name, bytes) = entry.map_err(failed)?;
        let name = stored_name(name.value())?;
        let list: StoredReaders = wire::decode(bytes.value())?;
        for reader in list.readers {
            let id = InstanceId::from_bytes(reader.reader).ok_or(StoreError::Corrupt(Corruption::Row))?;
            let stamp = Stamp::new(Fence(reader.fence), Version(reader.version));
            let row = ReaderRow { stamp, ttl: Duration::from_millis(reader.ttl_ms) };
            if !table.restore_reader(&name, id, row, now) {
                return Err(StoreError::Corrupt(Corruption::Row));
            }
        }
    }
    Ok(())
}

fn read_cells(transaction: &WriteTransaction, table: &mut Table) -> Result<()> {
    let cells = transaction.open_table(CELLS).map_err(failed)?;
    for entry in cells.iter().map_err(failed)? {
        let (name, cell) = entry.map_err(failed)?;
        let (version, value) = cell.value();
        let cell = Cell { version: Version(version), value: value.to_vec() };
        table.restore_cell(stored_name(name.value())?, cell);
    }
    Ok(())
}

fn stored_name(text: &str) -> Result<RecordName> {
    RecordName::parse(text).map_err(|_| StoreError::Corrupt(Corruption::Row))
}

fn open_error(error: DatabaseError) -> StoreError {
    match error {
        DatabaseError::UpgradeRequired(_) => StoreError::Unsupported(Feature::Schema),
        DatabaseError::Storage(redb::StorageError::Corrupted(_)) => StoreError::Corrupt(Corruption::Row),
        // A file that is no redb file at all says so with this kind.
        DatabaseError::Storage(redb::StorageError::Io(error))
            if error.kind() == std::io::ErrorKind::InvalidData =>
        {
            StoreError::Corrupt(Corruption::Row)
        }
        _ => StoreError::Unavailable { retry_after: RETRY },
    }
}

/// A failing disk is an outage; bytes that redb itself finds damaged are not.
fn failed(error: impl Into<redb::Error>) -> StoreError {
    match error.into() {
        redb::Error::Corrupted(_) | redb::Error::TableTypeMismatch { .. } => {
            StoreError::Corrupt(Corruption::Row)
        }
        _ => StoreError::Unavailable { retry_after: RETRY },
    }
}

/// A row as it stands in the file. Fields that a newer build wrote are lost on the next write of the row;
/// its format number keeps older builds out where that would matter.
#[derive(Debug, Default)]
struct StoredRow {
    fence: u64,
    lease: u64,
    instance: [u8; 16],
    ttl_ms: u64,
    version: u64,
    released: u32,
    record: Vec<u8>,
    unknown: UnknownFields,
}

impl From<&RowState> for StoredRow {
    fn from(state: &RowState) -> Self {
        Self {
            fence: state.hold.fence.0,
            lease: state.hold.lease.0,
            instance: state.hold.instance.to_bytes(),
            ttl_ms: millis(state.hold.ttl),
            version: state.snapshot.stamp.version.0,
            released: state.released.into(),
            record: if state.released { Vec::new() } else { state.snapshot.encoded.clone() },
            unknown: UnknownFields::default(),
        }
    }
}

impl StoredRow {
    fn into_state(self, name: RecordName) -> Result<RowState> {
        let instance = InstanceId::from_bytes(self.instance).ok_or(StoreError::Corrupt(Corruption::Row))?;
        let fence = Fence(self.fence);
        let stamp = Stamp::new(fence, Version(self.version));
        let snapshot = Snapshot::decode(&name, stamp, Identity::Instance(instance), self.record)?;
        let ttl = Duration::from_millis(self.ttl_ms);
        let hold = Hold { name, instance, fence, lease: LeaseId(self.lease), ttl };
        Ok(RowState { hold, snapshot: Arc::new(snapshot), released: self.released != 0 })
    }
}

impl Message for StoredRow {
    const PART: Part = Part::Row;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.fence = field.u64()?,
            2 => self.lease = field.u64()?,
            3 => self.instance = field.array()?,
            4 => self.ttl_ms = field.u64()?,
            5 => self.version = field.u64()?,
            6 => self.released = field.number()?,
            7 => self.record = field.bytes(RECORD_LEN_MAX)?.to_vec(),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.u64(1, self.fence);
        out.u64(2, self.lease);
        out.bytes(3, self.instance);
        out.u64(4, self.ttl_ms);
        out.u64(5, self.version);
        out.u64(6, self.released);
        out.bytes(7, &self.record);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

/// The readers of one row.
#[derive(Debug, Default)]
struct StoredReaders {
    readers: Vec<StoredReader>,
    unknown: UnknownFields,
}

impl From<Vec<(InstanceId, ReaderRow)>> for StoredReaders {
    fn from(readers: Vec<(InstanceId, ReaderRow)>) -> Self {
        let store = |(id, row): (InstanceId, ReaderRow)| StoredReader {
            reader: id.to_bytes(),
            fence: row.stamp.fence.0,
            version: row.stamp.version.0,
            ttl_ms: millis(row.ttl),
            unknown: UnknownFields::default(),
        };
        Self { readers: readers.into_iter().map(store).collect(), unknown: UnknownFields::default() }
    }
}

impl Message for StoredReaders {
    const PART: Part = Part::Row;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => field.push(&mut self.readers, usize::MAX)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.messages(1, &self.readers);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

#[derive(Debug, Default)]
struct StoredReader {
    reader: [u8; 16],
    fence: u64,
    version: u64,
    ttl_ms: u64,
    unknown: UnknownFields,
}

impl Message for StoredReader {
    const PART: Part = Part::Row;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.reader = field.array()?,
            2 => self.fence = field.u64()?,
            3 => self.version = field.u64()?,
            4 => self.ttl_ms = field.u64()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.bytes(1, self.reader);
        out.u64(2, self.fence);
        out.u64(3, self.version);
        out.u64(4, self.ttl_ms);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

/// Whole milliseconds, rounded up; lease lengths are bounded far below the range.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}
