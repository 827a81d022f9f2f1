//! Registered memory of a peer, its life, and manifests of what is too large for a record.

use super::open_enum;
use crate::error::{DecodeError, Part};
use crate::ids::{BufferId, Version};
use crate::limits::{BLOB_LEN_MAX, DEVICES_MAX, TEXT_LEN_MAX};
use crate::wire::{Field, Message, UnknownFields, Writer};

open_enum! {
    /// What a buffer is for.
    BufferKind {
        /// Key-value cache.
        Kv = 1 "kv",
        /// Weights.
        Weights = 2 "weights",
        /// Expert-parallel exchange.
        Ep = 3 "ep",
        /// Anything short-lived.
        Scratch = 4 "scratch",
    }
}

open_enum! {
    /// The life of a buffer: `Registering -> Ready -> Draining -> Retired -> Freed`, never backwards.
    BufferState {
        /// Not usable yet.
        Registering = 1 "registering",
        /// In use.
        Ready = 2 "ready",
        /// No new use; those in flight finish.
        Draining = 3 "draining",
        /// No access is left; the memory is still pinned.
        Retired = 4 "retired",
        /// Given back.
        Freed = 5 "freed",
    }
}

impl BufferState {
    /// Whether the next state of a buffer may be `next`. Retiring skips `Draining` only for a buffer
    /// that was never `Ready`.
    #[must_use]
    pub const fn may_become(self, next: Self) -> bool {
        use BufferState::{Draining, Freed, Ready, Registering, Retired};
        matches!(
            (self, next),
            (Registering, Ready | Retired) | (Ready, Draining) | (Draining, Retired) | (Retired, Freed)
        )
    }

    /// Whether others may hold or take keys of the buffer, so that no other live buffer shares its bytes.
    #[must_use]
    pub const fn is_live(self) -> bool {
        matches!(self, Self::Registering | Self::Ready)
    }
}

/// What peers may do with a buffer: bits, unknown ones kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Access(pub u32);

impl Access {
    /// Peers may READ.
    pub const REMOTE_READ: Self = Self(1);
    /// Peers may WRITE.
    pub const REMOTE_WRITE: Self = Self(2);
    /// Peers may use atomics.
    pub const REMOTE_ATOMIC: Self = Self(4);

    /// Both sets of rights.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `rights` are given.
    #[must_use]
    pub const fn allows(self, rights: Self) -> bool {
        self.0 & rights.0 == rights.0
    }
}

/// One registered buffer. Its identity is the id: addresses and keys are reused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffer {
    /// Identity.
    pub buffer_id: BufferId,
    /// First byte, as the owner's devices address it.
    pub addr: u64,
    /// Bytes; never 0.
    pub len: u64,
    /// Where the memory is: `cuda:0`, `cpu:1`.
    pub location: String,
    /// What it is for.
    pub kind: BufferKind,
    /// What peers may do.
    pub access: Access,
    /// Where it is in its life.
    pub state: BufferState,
    /// Remote keys: none, or one per device of the record, in their order.
    pub keys: Vec<u32>,
    /// The first version that showed it in this state.
    pub since_version: Version,
    /// Fields of a newer schema.
    pub unknown: UnknownFields,
}

impl Message for Buffer {
    const PART: Part = Part::Buffer;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.buffer_id = BufferId(field.u64()?),
            2 => self.addr = field.u64()?,
            3 => self.len = field.u64()?,
            4 => self.location = field.text(TEXT_LEN_MAX)?,
            5 => self.kind = BufferKind::from_code(field.number()?),
            6 => self.access = Access(field.number()?),
            7 => self.state = BufferState::from_code(field.number()?),
            8 => field.push_u32(&mut self.keys, DEVICES_MAX)?,
            9 => self.since_version = Version(field.u64()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.u64(1, self.buffer_id.0);
        out.u64(2, self.addr);
        out.u64(3, self.len);
        out.bytes(4, &self.location);
        out.u64(5, self.kind.code());
        out.u64(6, self.access.0);
        out.u64(7, self.state.code());
        out.packed(8, &self.keys);
        out.u64(9, self.since_version.0);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

/// A list too large for a record: what it is, its digest, and who serves it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// `experts`, `tensors`, or something newer.
    pub kind: String,
    /// Digest of the list.
    pub digest: Vec<u8>,
    /// Entries.
    pub count: u64,
    /// Bytes.
    pub bytes: u64,
    /// Who serves it.
    pub endpoint: String,
    /// Fields of a newer schema.
    pub unknown: UnknownFields,
}

impl Message for Manifest {
    const PART: Part = Part::Manifest;

    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
        match field.number {
            1 => self.kind = field.text(TEXT_LEN_MAX)?,
            2 => self.digest = field.bytes(BLOB_LEN_MAX)?.to_vec(),
            3 => self.count = field.u64()?,
            4 => self.bytes = field.u64()?,
            5 => self.endpoint = field.text(TEXT_LEN_MAX)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn write(&self, out: &mut Writer) {
        out.bytes(1, &self.kind);
        out.bytes(2, &self.digest);
        out.u64(3, self.count);
        out.u64(4, self.bytes);
        out.bytes(5, &self.endpoint);
    }

    fn unknown(&self) -> &UnknownFields {
        &self.unknown
    }

    fn unknown_mut(&mut self) -> &mut UnknownFields {
        &mut self.unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_lives_forwards_only() {
        use BufferState::{Draining, Freed, Ready, Registering, Retired};
        let states = [Registering, Ready, Draining, Retired, Freed];
        let good = [(0, 1), (0, 3), (1, 2), (2, 3), (3, 4)];
        for (i, from) in states.into_iter().enumerate() {
            for (j, to) in states.into_iter().enumerate() {
                assert_eq!(from.may_become(to), good.contains(&(i, j)), "{from} -> {to}");
            }
        }
        assert!(!BufferState::Unknown(9).may_become(Ready));
    }

    #[test]
    fn rights_add_up() {
        let both = Access::REMOTE_READ.and(Access::REMOTE_WRITE);
        assert!(both.allows(Access::REMOTE_WRITE) && !both.allows(Access::REMOTE_ATOMIC));
    }
}
