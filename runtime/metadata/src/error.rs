//! What can go wrong, each as a value that a caller can match.
//!
//! INVARIANT: the same misfortune has the same variant on every backend (`contract` holds them to it),
//! and [`StoreError::Unavailable`] is never reported as "nothing there".

use core::time::Duration;
use std::borrow::Cow;
use std::fmt;

use crate::ids::{Fence, Version};

/// The result of a store operation.
pub type Result<T, E = StoreError> = core::result::Result<T, E>;

/// Why a store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No record, or no cell, has this name.
    #[error("no such name")]
    NotFound,
    /// Another process owns the name, and its lease is alive.
    #[error("the name is held under fence {fence}, its lease runs for another {} ms", .remaining.as_millis())]
    Held {
        /// The owner's fence.
        fence: Fence,
        /// What is left of the owner's lease.
        remaining: Duration,
    },
    /// The name has another owner now: this writer is out, for good.
    #[error("fenced: the name is under fence {current} now")]
    Fenced {
        /// The fence of the present owner, or of the last one.
        current: Fence,
    },
    /// The compare-and-set found another version.
    #[error("conflict: the current version is {current}")]
    Conflict {
        /// What the store holds.
        current: Version,
    },
    /// The lease ran out: the owner's for a write or a read, the reader's for a use.
    #[error("the lease ran out under fence {fence}")]
    LeaseExpired {
        /// The fence whose lease it was.
        fence: Fence,
    },
    /// The store cannot be asked now. Says nothing about any record.
    #[error("the store is unavailable, retry after {} ms", .retry_after.as_millis())]
    Unavailable {
        /// When to try again at the earliest.
        retry_after: Duration,
    },
    /// Bytes that do not mean what they should.
    #[error("corrupt: {0}")]
    Corrupt(Corruption),
    /// More than a bound of `limits`.
    #[error("{what} of {len} is too large: the limit is {limit}")]
    TooLarge {
        /// Which bound.
        what: Bounded,
        /// What was asked for, in the bound's unit.
        len: u64,
        /// The bound.
        limit: u64,
    },
    /// This store, or this build, cannot do it.
    #[error("{0} is not supported")]
    Unsupported(Feature),
    /// The budget was used up; whether the operation took effect is unknown.
    #[error("no answer within {} ms", .budget.as_millis())]
    Deadline {
        /// The budget.
        budget: Duration,
    },
    /// The token is missing or wrong.
    #[error("the store refused the token")]
    Unauthenticated,
    /// An argument was refused before anything was asked of the store.
    #[error(transparent)]
    Input(#[from] InputError),
}

impl StoreError {
    /// Whether the same request may succeed later, unchanged.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Deadline { .. })
    }
}

impl From<DecodeError> for StoreError {
    fn from(error: DecodeError) -> Self {
        Self::Corrupt(Corruption::Record(error))
    }
}

/// What exactly is corrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Corruption {
    /// A record that does not decode, or breaks a rule.
    #[error("record: {0}")]
    Record(DecodeError),
    /// A batch came back with another number of outcomes than names were asked for.
    #[error("{got} outcomes for {asked} names")]
    BatchLength {
        /// Names asked for.
        asked: u64,
        /// Outcomes that came.
        got: u64,
    },
    /// A stored row or a reply that another version, or another program, wrote.
    #[error("the store's own bytes")]
    Row,
}

macro_rules! closed_list {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal => $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// Every value, for tables and tests.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The number that stands for it on the wire.
            #[must_use]
            pub const fn code(self) -> u32 {
                match self { $(Self::$variant => $code,)* }
            }

            /// The value with this number.
            #[must_use]
            pub const fn from_code(code: u32) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text,)* })
            }
        }
    };
}

closed_list! {
    /// The bounds that a store enforces.
    Bounded {
        /// Bytes of a record.
        Record = 1 => "a record",
        /// Bytes of a cell.
        Cell = 2 => "a cell",
        /// Names in a batch.
        Batch = 3 => "a batch",
        /// Entries of a page.
        Page = 4 => "a page",
        /// Names in the store.
        Names = 5 => "the number of names",
        /// Readers of a name.
        Readers = 6 => "the number of readers",
        /// Versions under one fence.
        Versions = 7 => "the version number",
        /// Bytes of a message between client and server.
        Message = 8 => "a message",
        /// Open segments.
        Segments = 9 => "the number of segments",
    }
}

closed_list! {
    /// What a store or a build may lack.
    Feature {
        /// A backend that this build leaves out.
        Backend = 1 => "this backend in this build",
        /// A record that only newer readers understand.
        Schema = 2 => "a record of a newer schema",
        /// An operation that the server does not know.
        Operation = 3 => "this operation",
        /// `redb:`, left out of this build.
        Redb = 4 => "redb: in a build without the cargo feature redb",
        /// `ibex://` and `ibex+unix:`, left out of this build.
        Grpc = 5 => "ibex:// in a build without the cargo feature grpc",
        /// `redis://` and `rediss://`, left out of this build.
        Redis = 6 => "redis:// in a build without the cargo feature redis",
        /// `etcd://`, left out of this build.
        Etcd = 7 => "etcd:// in a build without the cargo feature etcd",
        /// `k8s://`, left out of this build.
        K8s = 8 => "k8s:// in a build without the cargo feature k8s",
        /// `layered+`, left out of this build.
        Layered = 9 => "layered+ in a build without the cargo feature layered",
    }
}

closed_list! {
    /// The structures of a record, as errors name them.
    Part {
        /// The record itself.
        Record = 1 => "record",
        /// What the weights are.
        Source = 2 => "source identity",
        /// A device.
        Device = 3 => "device",
        /// A tagged transport.
        Transport = 4 => "transport",
        /// The queue pairs of GPU-initiated exchange.
        EpIbgda = 5 => "ep-ibgda transport",
        /// A transfer engine.
        TransferEngine = 6 => "transfer-engine transport",
        /// Plain TCP.
        Tcp = 7 => "tcp transport",
        /// A NIXL agent.
        Nixl = 8 => "nixl transport",
        /// The shape of a ring.
        Ring = 9 => "ring geometry",
        /// A registered buffer.
        Buffer = 10 => "buffer",
        /// A manifest.
        Manifest = 11 => "manifest",
        /// A membership view.
        View = 12 => "membership view",
        /// A member of a view.
        Member = 13 => "member",
        /// A stored row.
        Row = 14 => "row",
        /// An error in a reply.
        Error = 15 => "error",
        /// An entry of a map.
        Entry = 16 => "map entry",
    }
}

/// Bytes that are not a record, or a record that breaks a rule: where, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{part}, field {field}: {problem}")]
pub struct DecodeError {
    /// The structure.
    pub part: Part,
    /// Its field number in `proto/record.proto`; 0 for the structure as a whole.
    pub field: u32,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The bytes end inside the field.
    #[error("truncated")]
    Truncated,
    /// A variable-length number of more than ten bytes, or above 64 bits.
    #[error("malformed number")]
    Varint,
    /// The field has another encoding than the schema says, or one that protobuf abandoned.
    #[error("wire type {found}")]
    WireType {
        /// What was found.
        found: u32,
    },
    /// A field number of 0 or above 2^29 - 1.
    #[error("field number out of range")]
    FieldNumber,
    /// Text that is not UTF-8.
    #[error("not utf-8")]
    Utf8,
    /// A fixed-size value of another size.
    #[error("{found} bytes instead of {expected}")]
    Length {
        /// Bytes found.
        found: u64,
        /// Bytes expected.
        expected: u64,
    },
    /// A number outside its type or rule.
    #[error("{value} is above {max}")]
    Range {
        /// The number.
        value: u64,
        /// The largest good one.
        max: u64,
    },
    /// A list or a text longer than its bound.
    #[error("{count} elements or bytes, the limit is {max}")]
    TooMany {
        /// How many.
        count: u64,
        /// The bound.
        max: u64,
    },
    /// Something that must be there is not.
    #[error("missing")]
    Missing,
    /// Two fields that exclude each other, or one identity twice.
    #[error("given twice, or beside its alternative")]
    Duplicate,
    /// A buffer of length 0.
    #[error("length 0")]
    Empty,
    /// Address plus length does not fit in 64 bits.
    #[error("address + length overflows")]
    Overflow,
    /// Two live buffers share bytes.
    #[error("overlaps another live buffer")]
    Overlap,
    /// Neither no keys nor one key per device.
    #[error("{keys} keys for {devices} devices")]
    Keys {
        /// Keys found.
        keys: u64,
        /// Devices of the record.
        devices: u64,
    },
    /// The record says that only readers of a newer schema understand it.
    #[error("needs a reader of schema {needed}, this one reads {known}")]
    Schema {
        /// What it needs.
        needed: u64,
        /// What this build reads.
        known: u64,
    },
    /// A value that differs from where the record is stored or from who stores it.
    #[error("does not match the name or the owner it is stored under")]
    Mismatch,
}

/// An argument or a setting that was refused: which, what it was, what would have been right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value:?} is refused: it must be {limit}")]
pub struct InputError {
    /// The argument.
    pub field: Cow<'static, str>,
    /// What was given, cut to a readable length.
    pub value: Box<str>,
    /// What would have been accepted.
    pub limit: Cow<'static, str>,
}

/// Characters of a refused value that an error repeats.
const VALUE_SHOWN_MAX: usize = 96;

impl InputError {
    /// A refusal of `value` for `field`.
    #[must_use]
    pub fn new(field: &'static str, value: &str, limit: &'static str) -> Self {
        let value = value.chars().take(VALUE_SHOWN_MAX).collect();
        Self { field: field.into(), value, limit: limit.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_values_and_limits() {
        let error = StoreError::TooLarge { what: Bounded::Record, len: 70_000, limit: 65_536 };
        assert_eq!(error.to_string(), "a record of 70000 is too large: the limit is 65536");
        let error =
            DecodeError { part: Part::Buffer, field: 3, problem: Problem::Keys { keys: 1, devices: 2 } };
        assert_eq!(
            StoreError::from(error).to_string(),
            "corrupt: record: buffer, field 3: 1 keys for 2 devices"
        );
        let error = InputError::new("prefix", &"x".repeat(500), "short");
        assert_eq!(error.value.len(), VALUE_SHOWN_MAX);
    }

    #[test]
    fn codes_are_distinct_and_read_back() {
        for &part in Part::ALL {
            assert_eq!(Part::from_code(part.code()), Some(part));
        }
        for &bound in Bounded::ALL {
            assert_eq!(Bounded::from_code(bound.code()), Some(bound));
        }
        for &feature in Feature::ALL {
            assert_eq!(Feature::from_code(feature.code()), Some(feature));
        }
        assert_eq!(Part::from_code(0), None);
    }
}
