//! The ways to reach a peer. The tag decides, and a tag that is not known is kept with its bytes.

use super::device::PortAddress;
use crate::error::{DecodeError, Part, Problem};
use crate::limits::{BLOB_LEN_MAX, QPNS_MAX, RECORD_LEN_MAX, TEXT_LEN_MAX};
use crate::wire::{self, Field, Message, UnknownFields, Writer};

/// One entry of a record's list of transports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transport {
    /// How.
    pub way: Way,
    /// Fields that a newer writer put beside tag and body.
    pub unknown: UnknownFields,
}

/// One way to reach a peer; a peer may offer several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Queue pairs for GPU-initiated exchange.
    EpIbgda(EpIbgda),
    /// A Mooncake transfer engine.
    TransferEngine(TransferEngine),
    /// Plain TCP.
    Tcp(Tcp),
    /// A NIXL agent.
    Nixl(Nixl),
    /// Something newer, kept verbatim.
    Unknown {
        /// Its tag.
        kind: String,
        /// Its body.
        raw: Vec<u8>,
    },
}

const EP_IBGDA: &str = "ep-ibgda";
const TRANSFER_ENGINE: &str = "transfer-engine";
const TCP: &str = "tcp";
const NIXL: &str = "nixl";

impl Default for Way {
    fn default() -> Self {
        Self::Unknown { kind: String::new(), raw: Vec::new() }
    }
}

impl From<Way> for Transport {
    fn from(way: Way) -> Self {
        Self { way, unknown: UnknownFields::default() }
    }
}

impl Way {
    /// The tag of the wire.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::EpIbgda(_) => EP_IBGDA,
            Self::TransferEngine(_) => TRANSFER_ENGINE,
            Self::Tcp(_) => TCP,
            Self::Nixl(_) => NIXL,
            Self::Unknown { kind, .. } => kind,
        }
    }

    fn body(&self) -> Vec<u8> {
        match self {
            Self::EpIbgda(body) => wire::encode(body),
            Self::TransferEngine(body) => wire::encode(body),
            Self::Tcp(body) => wire::encode(body),
            Self::Nixl(body) => wire::encode(body),
            Self::Unknown { raw, .. } => raw.clone(),
        }
    }

    fn from_parts(kind: String, raw: Vec<u8>) -> Result<Self, DecodeError> {
        Ok(match kind.as_str() {
            EP_IBGDA => Self::EpIbgda(wire::decode(&raw)?),
            TRANSFER_ENGINE => Self::TransferEngine(wire::decode(&raw)?),
            TCP => Self::Tcp(wire::decode(&raw)?),
            NIXL => Self::Nixl(wire::decode(&raw)?),
            _ => Self::Unknown { kind, raw },
        })
    }
}

/// Tag and body as they stand on the wire: the body cannot be read before the tag is known.
#[derive(Debug, Default)]
pub(super) struct Tagged {
    kind: String,
    raw: Vec<u8>,
    unknown: UnknownFields,
}

impl From<&Transport> for Tagged {
    fn from(transport: &Transport) -> Self {
        let way = &transport.way;
        Self { kind: way.kind().to_owned(), raw: way.body(), unknown: transport.unknown.clone() }
    }
}

impl TryFrom<Tagged> for Transport {
    type Error = DecodeError;

    fn try_from(tagged: Tagged) -> Result<Self, DecodeError> {
        Ok(Self { way: Way::from_parts(tagged.kind, tagged.raw)?, unknown: tagged.unknown })
    }
}

impl Message for Tagged {
    const PART: Part = Part::Transport;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.kind = field.text(TEXT_LEN_MAX)?,
            2 => self.raw = field.bytes(RECORD_LEN_MAX)?.to_vec(),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.bytes(1, &self.kind);
        out.bytes(2, &self.raw);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

/// The addresses of a peer's exchange buffers and of the queue pairs that write to them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EpIbgda {
    /// Remote address.
    pub raddr: u64,
    /// Remote key.
    pub rkey: u32,
    /// Queue-pair numbers, one per peer slot and channel.
    pub qpns: Vec<u32>,
    /// Where its port is. Always present in a record that decoded.
    pub port: Option<PortAddress>,
    /// How a process of the same machine maps the buffer; an empty handle is a handle.
    pub ipc_handle: Option<Vec<u8>>,
    /// Shape of the ring.
    pub ring: RingGeometry,
    /// Fields of a newer schema.
    pub unknown: UnknownFields,
}

impl Message for EpIbgda {
    const PART: Part = Part::EpIbgda;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.raddr = field.u64()?,
            2 => self.rkey = field.number()?,
            3 => field.push_u32(&mut self.qpns, QPNS_MAX)?,
            4 | 5 if self.port.is_some() => return Err(field.error(Problem::Duplicate)),
            4 => self.port = Some(PortAddress::Lid(field.number()?)),
            5 => self.port = Some(PortAddress::Gid(field.array()?)),
            6 => self.ipc_handle = Some(field.bytes(BLOB_LEN_MAX)?.to_vec()),
            7 => self.ring = field.message()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.u64(1, self.raddr);
        out.u64(2, self.rkey);
        out.packed(3, &self.qpns);
        match self.port {
            Some(PortAddress::Lid(lid)) => out.optional(4, Some(lid)),
            Some(PortAddress::Gid(gid)) => out.bytes(5, gid),
            None => {}
        }
        if let Some(handle) = &self.ipc_handle {
            out.present(6, handle);
        }
        if self.ring != RingGeometry::default() {
            out.message(7, &self.ring);
        }
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

/// Shape of a ring of exchange slots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RingGeometry {
    /// Ring slots.
    pub slots: u32,
    /// Work-queue entries per queue pair.
    pub depth: u32,
    /// Bytes of one slot.
    pub slot_bytes: u64,
    /// Fields of a newer schema.
    pub unknown: UnknownFields,
}

impl Message for RingGeometry {
    const PART: Part = Part::Ring;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.slots = field.number()?,
            2 => self.depth = field.number()?,
            3 => self.slot_bytes = field.u64()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.u64(1, self.slots);
        out.u64(2, self.depth);
        out.u64(3, self.slot_bytes);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

/// How to reach a Mooncake transfer engine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TransferEngine {
    /// Its session, `ip:port`.
    pub session: String,
    /// Host of its data port.
    pub host: String,
    /// Its data port.
    pub data_port: u16,
    /// Version of the data protocol.
    pub protocol_version: u32,
    /// Fields of a newer schema.
    pub unknown: UnknownFields,
}

impl Message for TransferEngine {
    const PART: Part = Part::TransferEngine;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.session = field.text(TEXT_LEN_MAX)?,
            2 => self.host = field.text(TEXT_LEN_MAX)?,
            3 => self.data_port = field.number()?,
            4 => self.protocol_version = field.number()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.bytes(1, &self.session);
        out.bytes(2, &self.host);
        out.u64(3, self.data_port);
        out.u64(4, self.protocol_version);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

/// A TCP endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tcp {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Version of the protocol spoken there.
    pub protocol_version: u32,
    /// Fields of a newer schema.
    pub unknown: UnknownFields,
}

impl Message for Tcp {
    const PART: Part = Part::Tcp;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.host = field.text(TEXT_LEN_MAX)?,
            2 => self.port = field.number()?,
            3 => self.protocol_version = field.number()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.bytes(1, &self.host);
        out.u64(2, self.port);
        out.u64(3, self.protocol_version);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

/// How a NIXL agent is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NixlReach {
    /// By the agent's own metadata, which may be empty.
    Blob(Vec<u8>),
    /// By an endpoint that is asked for the metadata.
    Endpoint(String),
}

/// A NIXL agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Nixl {
    /// Its name.
    pub agent: String,
    /// How to reach it; absent only if a writer said nothing.
    pub reach: Option<NixlReach>,
    /// Fields of a newer schema.
    pub unknown: UnknownFields,
}

impl Message for Nixl {
    const PART: Part = Part::Nixl;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.agent = field.text(TEXT_LEN_MAX)?,
            2 | 3 if self.reach.is_some() => return Err(field.error(Problem::Duplicate)),
            2 => self.reach = Some(NixlReach::Blob(field.bytes(BLOB_LEN_MAX)?.to_vec())),
            3 => self.reach = Some(NixlReach::Endpoint(field.text(TEXT_LEN_MAX)?)),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.bytes(1, &self.agent);
        match &self.reach {
            Some(NixlReach::Blob(blob)) => out.present(2, blob),
            Some(NixlReach::Endpoint(endpoint)) => out.present(3, endpoint),
            None => {}
        }
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}
