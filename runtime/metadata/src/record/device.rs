//! Network devices, and where a port is on its network.

use super::open_enum;
use crate::error::{DecodeError, Part};
use crate::limits::{BLOB_LEN_MAX, TEXT_LEN_MAX};
use crate::wire::{Field, Message, UnknownFields, Writer};

open_enum! {
    /// The link layer of a port.
    LinkLayer {
        /// InfiniBand: addressed by LID.
        InfiniBand = 1 "infiniband",
        /// Ethernet (RoCE): addressed by GID.
        Ethernet = 2 "ethernet",
    }
}

/// Where a port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PortAddress {
    /// InfiniBand.
    Lid(u16),
    /// RoCE.
    Gid([u8; 16]),
}

/// One network device of a peer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// As the peer's system calls it, `mlx5_0` for example.
    pub name: String,
    /// Its link layer.
    pub link_layer: LinkLayer,
    /// LID; 0 on Ethernet.
    pub lid: u16,
    /// GID; zero where the port has none.
    pub gid: [u8; 16],
    /// Entity id of fabrics that have one; empty elsewhere.
    pub eid: Vec<u8>,
    /// Port number, from 1.
    pub port: u8,
    /// Fields of a newer schema.
    pub unknown: UnknownFields,
}

impl Message for Device {
    const PART: Part = Part::Device;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.name = field.text(TEXT_LEN_MAX)?,
            2 => self.link_layer = LinkLayer::from_code(field.number()?),
            3 => self.lid = field.number()?,
            4 => self.gid = field.array()?,
            5 => self.eid = field.bytes(BLOB_LEN_MAX)?.to_vec(),
            6 => self.port = field.number()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.bytes(1, &self.name);
        out.u64(2, self.link_layer.code());
        out.u64(3, self.lid);
        if self.gid != [0; 16] {
            out.bytes(4, self.gid);
        }
        out.bytes(5, &self.eid);
        out.u64(6, self.port);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}
