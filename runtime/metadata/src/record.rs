//! What a peer publishes about itself, and the rules under which others believe it.
//!
//! Pure: bytes in, values out. A [`PeerRecord`] owns all it holds. Stamp, owner and lease stand beside
//! a record in the store ([`crate::store::Snapshot`]), so that a heartbeat never rewrites a record.
//!
//! INVARIANTS:
//! - decoding, then encoding gives the same fields, unknown ones and unknown transports included;
//! - what [`PeerRecord::decode`] returns passed [`PeerRecord::check`];
//! - nothing is inferred from which fields are present: every alternative has its discriminator.

mod buffer;
mod check;
mod device;
mod legacy;
mod source;
mod transport;

use std::fmt;

pub use self::buffer::{Access, Buffer, BufferKind, BufferState, Manifest};
pub use self::device::{Device, LinkLayer, PortAddress};
pub use self::source::{COMPATIBILITY, SourceIdentity};
use self::transport::Tagged;
pub use self::transport::{EpIbgda, Nixl, NixlReach, RingGeometry, Tcp, TransferEngine, Transport, Way};
use crate::error::{Bounded, DecodeError, Part, Problem, StoreError};
use crate::ids::InstanceId;
use crate::limits::{
    BUFFERS_MAX, DEVICES_MAX, MANIFESTS_MAX, NAME_PART_LEN_MAX, RECORD_LEN_MAX, TRANSPORTS_MAX,
};
use crate::name::RecordName;
use crate::wire::{self, Field, Message, UnknownFields, Writer};

/// The schema that this build writes.
pub const SCHEMA: u32 = 2;

/// An enumeration of the wire whose newer values are kept as numbers.
macro_rules! open_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
            /// A value of a newer schema, or none given (0).
            Unknown(u32),
        }

        impl $name {
            /// The value with this number; [`Self::Unknown`] for a number not in the list.
            #[must_use]
            pub const fn from_code(code: u32) -> Self {
                match code { $($code => Self::$variant,)* other => Self::Unknown(other) }
            }

            /// The number of the wire.
            #[must_use]
            pub const fn code(self) -> u32 {
                match self { $(Self::$variant => $code,)* Self::Unknown(code) => code }
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::Unknown(0)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self {
                    $(Self::$variant => f.write_str($text),)*
                    Self::Unknown(code) => write!(f, "unknown({code})"),
                }
            }
        }
    };
}
use open_enum;

open_enum! {
    /// How far a peer is. `Stale` is not a state: it is derived from an expired lease.
    RecordState {
        /// Connecting and loading; not to be used.
        Joining = 1 "joining",
        /// In service.
        Ready = 2 "ready",
        /// Finishes what it has; takes nothing new.
        Draining = 3 "draining",
        /// Gone on purpose.
        Left = 4 "left",
    }
}

/// Which process a record speaks of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Identity {
    /// A process that drew an instance id.
    Instance(InstanceId),
    /// A peer that has none. Compared by content, refreshed on failure, never given one.
    #[default]
    Legacy,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Instance(id) => id.fmt(f),
            Self::Legacy => f.write_str("legacy"),
        }
    }
}

/// Everything a peer says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerRecord {
    /// The writer's schema; [`SCHEMA`] for what this build makes, or brought up to date on reading.
    pub schema: u32,
    /// The oldest schema whose readers understand the record; 0: any.
    pub readable_from: u32,
    /// First part of the name.
    pub cluster: String,
    /// Second part of the name.
    pub group: String,
    /// Third part of the name.
    pub name: String,
    /// Which process.
    pub identity: Identity,
    /// How far it is.
    pub state: RecordState,
    /// Its rank, if it has one.
    pub rank: Option<u32>,
    /// How many ranks it believes there are; 0: no idea.
    pub world_hint: u32,
    /// Which weights it holds.
    pub source: Option<SourceIdentity>,
    /// Its network devices.
    pub devices: Vec<Device>,
    /// The ways to reach it.
    pub transports: Vec<Transport>,
    /// Its registered memory.
    pub buffers: Vec<Buffer>,
    /// Large lists that live elsewhere, by digest.
    pub manifests: Vec<Manifest>,
    /// Fields of a newer schema.
    pub unknown: UnknownFields,
}

impl PeerRecord {
    /// What a claim starts from: nothing but who it is, `Joining`.
    #[must_use]
    pub fn empty(name: &RecordName, identity: Identity) -> Self {
        let (cluster, group, name) = name.parts();
        Self {
            schema: SCHEMA,
            cluster: cluster.to_owned(),
            group: group.to_owned(),
            name: name.to_owned(),
            identity,
            state: RecordState::Joining,
            ..Self::default()
        }
    }

    /// The name under which the record is stored.
    ///
    /// # Errors
    /// [`DecodeError`] if a part breaks the rule of names.
    pub fn key(&self) -> Result<RecordName, DecodeError> {
        RecordName::new(&self.cluster, &self.group, &self.name)
            .map_err(|error| record_error(field_of(&error.field), Problem::Mismatch))
    }

    /// Reads and checks a record of any schema that this build understands.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] above [`RECORD_LEN_MAX`]; [`StoreError::Corrupt`] with the field and the
    /// rule otherwise.
    pub fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        check_len(bytes.len())?;
        let incoming: legacy::Incoming = wire::decode(bytes)?;
        let record = incoming.into_record()?;
        if record.readable_from > SCHEMA {
            let problem = Problem::Schema { needed: record.readable_from.into(), known: SCHEMA.into() };
            return Err(record_error(2, problem).into());
        }
        record.check()?;
        Ok(record)
    }

    /// Checks and writes the record.
    ///
    /// # Errors
    /// As [`PeerRecord::decode`]: nothing leaves that would be refused on arrival.
    pub fn encode(&self) -> Result<Vec<u8>, StoreError> {
        self.check()?;
        let bytes = wire::encode(self);
        check_len(bytes.len())?;
        Ok(bytes)
    }
}

impl PeerRecord {
    pub(crate) fn write_transports(&self, out: &mut Writer) {
        for transport in &self.transports {
            out.message(12, &Tagged::from(transport));
        }
    }

    fn push_transport(&mut self, field: &Field<'_>) -> Result<(), DecodeError> {
        let mut tagged: Vec<Tagged> = Vec::new();
        let room = TRANSPORTS_MAX - self.transports.len();
        field.push(&mut tagged, room)?;
        for tagged in tagged {
            self.transports.push(tagged.try_into()?);
        }
        Ok(())
    }
}

fn check_len(len: usize) -> Result<(), StoreError> {
    if len <= RECORD_LEN_MAX {
        return Ok(());
    }
    Err(StoreError::TooLarge { what: Bounded::Record, len: len as u64, limit: RECORD_LEN_MAX as u64 })
}

fn record_error(field: u32, problem: Problem) -> DecodeError {
    DecodeError { part: Part::Record, field, problem }
}

fn field_of(name: &str) -> u32 {
    match name {
        "cluster" => 3,
        "group" => 4,
        _ => 5,
    }
}

impl Message for PeerRecord {
    const PART: Part = Part::Record;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.schema = field.number()?,
            2 => self.readable_from = field.number()?,
            3 => self.cluster = field.text(NAME_PART_LEN_MAX)?,
            4 => self.group = field.text(NAME_PART_LEN_MAX)?,
            5 => self.name = field.text(NAME_PART_LEN_MAX)?,
            6 => {
                let id = InstanceId::from_bytes(field.array()?).ok_or(field.error(Problem::Missing))?;
                self.identity = Identity::Instance(id);
            }
            7 => self.state = RecordState::from_code(field.number()?),
            8 => self.rank = Some(field.number()?),
            9 => self.world_hint = field.number()?,
            10 => self.source = Some(field.message()?),
            11 => field.push(&mut self.devices, DEVICES_MAX)?,
            12 => self.push_transport(field)?,
            13 => field.push(&mut self.buffers, BUFFERS_MAX)?,
            14 => field.push(&mut self.manifests, MANIFESTS_MAX)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.u64(1, self.schema);
        out.u64(2, self.readable_from);
        out.bytes(3, &self.cluster);
        out.bytes(4, &self.group);
        out.bytes(5, &self.name);
        if let Identity::Instance(id) = self.identity {
            out.bytes(6, id.to_bytes());
        }
        out.u64(7, self.state.code());
        out.optional(8, self.rank);
        out.u64(9, self.world_hint);
        if let Some(source) = &self.source {
            out.message(10, source);
        }
        out.messages(11, &self.devices);
        self.write_transports(out);
        out.messages(13, &self.buffers);
        out.messages(14, &self.manifests);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}
