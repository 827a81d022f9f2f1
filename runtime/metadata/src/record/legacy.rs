//! Schema 1: one transport and bare address ranges, flattened into the record. Read, never written.
//!
//! Its writers had no instance id, and none is made up for them: they stay [`Identity::Legacy`]. The
//! transport is named by its discriminator, never guessed from which fields are filled.
//!
//! [`Identity::Legacy`]: super::Identity::Legacy

use super::{
    Buffer, BufferState, Nixl, NixlReach, PeerRecord, SCHEMA, Tcp, TransferEngine, UnknownFields, Way,
};
use crate::error::{DecodeError, Part, Problem};
use crate::ids::BufferId;
use crate::limits::{BLOB_LEN_MAX, BUFFERS_MAX, TEXT_LEN_MAX};
use crate::wire::{Field, Message, Writer};

/// The discriminator of schema 1.
const BACKEND_TCP: u32 = 1;
const BACKEND_TRANSFER_ENGINE: u32 = 2;
const BACKEND_NIXL: u32 = 3;

/// The largest number of a field of today's buffers.
const BUFFER_FIELD_MAX: u32 = 9;

/// A record as it arrives: today's fields, and those of schema 1.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    record: PeerRecord,
    old: Flattened,
}

/// The fields of schema 1.
#[derive(Debug, Default)]
struct Flattened {
    backend: Option<u32>,
    host: String,
    port: u16,
    blob: Vec<u8>,
    buffers: Vec<Range>,
    seen: Option<u32>,
}

/// A bare range of memory.
#[derive(Debug, Default)]
struct Range {
    addr: u64,
    len: u64,
    unknown: UnknownFields,
}

impl Flattened {
    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            20 => self.backend = Some(field.number()?),
            21 => self.host = field.text(TEXT_LEN_MAX)?,
            22 => self.port = field.number()?,
            23 => self.blob = field.bytes(BLOB_LEN_MAX)?.to_vec(),
            24 => field.push(&mut self.buffers, BUFFERS_MAX)?,
            _ => return Ok(false),
        }
        self.seen = Some(field.number);
        Ok(true)
    }

    fn way(&self) -> Option<Way> {
        let host = self.host.clone();
        Some(match self.backend? {
            BACKEND_TCP => Way::Tcp(Tcp { host, port: self.port, ..Tcp::default() }),
            BACKEND_TRANSFER_ENGINE => Way::TransferEngine(TransferEngine {
                session: format!("{host}:{}", self.port),
                host,
                data_port: self.port,
                ..TransferEngine::default()
            }),
            BACKEND_NIXL => Way::Nixl(Nixl {
                agent: host,
                reach: Some(NixlReach::Blob(self.blob.clone())),
                ..Nixl::default()
            }),
            code => Way::Unknown { kind: format!("schema-1-backend-{code}"), raw: self.blob.clone() },
        })
    }
}

impl Incoming {
    /// The record, with the fields of schema 1 turned into today's; they are refused in a record that
    /// says it is of another schema.
    pub(super) fn into_record(self) -> Result<PeerRecord, DecodeError> {
        let Self { mut record, old } = self;
        if record.schema != 1 {
            let contradiction =
                |field| DecodeError { part: Part::Record, field, problem: Problem::Duplicate };
            return old.seen.map_or(Ok(record), |field| Err(contradiction(field)));
        }
        record.schema = SCHEMA;
        record.transports.extend(old.way().map(Into::into));
        let ids = record.buffers.len() as u64..;
        record.buffers.extend(ids.zip(old.buffers).map(|(id, range)| Buffer {
            buffer_id: BufferId(id),
            addr: range.addr,
            len: range.len,
            state: BufferState::Ready,
            unknown: range.unknown,
            ..Buffer::default()
        }));
        Ok(record)
    }
}

impl Message for Incoming {
    const PART: Part = Part::Record;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        Ok(self.record.field(field)? || self.old.field(field)?)
    }

    fn write(&self, out: &mut Writer) {
        self.record.write(out);
    }

    fn unknown(&self) -> &UnknownFields {
        self.record.unknown()
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        self.record.unknown_mut()
    }
}

impl Message for Range {
    const PART: Part = Part::Buffer;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.addr = field.u64()?,
            2 => self.len = field.u64()?,
            // Kept verbatim, they would be read as what today's buffers have under these numbers. Ranges never
            // had them.
            number @ 3..=BUFFER_FIELD_MAX => {
                return Err(DecodeError { part: Part::Buffer, field: number, problem: Problem::Duplicate });
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.u64(1, self.addr);
        out.u64(2, self.len);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}
