//! The bytes of the rendezvous: a greeting, its answer, then records. Little-endian.
//!
//! Owns nothing. Parsers take what came so far and say "more" or refuse; a length is checked before anything of that
//! length is kept.
//!
//! ```text
//!  greeting   magic[8]  version u16  token_len u16  rank u32  num_ranks u32  token[token_len]
//!  answer     magic[8]  version u16  code u16       value u32
//!  record     kind u8   key_len u8   zero u16       budget_ms u32  body_len u32  key[key_len]  body[body_len]
//! ```

use super::{Refusal, TOKEN_LEN_MAX};
use crate::ids::Rank;

/// First bytes of both directions.
const MAGIC: [u8; 8] = *b"ibexrdv\0";
/// Version of everything in this file.
pub(super) const VERSION: u16 = 1;
/// Longest key of an exchange.
pub const KEY_LEN_MAX: usize = 64;
/// Longest blob of one rank: an offer to each of 512 peers fits.
pub const BLOB_LEN_MAX: usize = 1 << 20;
const GREETING_LEN: usize = 20;
/// Length of an answer.
pub(super) const ANSWER_LEN: usize = 16;
/// Length of a record before its key.
pub(super) const RECORD_LEN: usize = 12;

/// Why bytes are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken(pub(super) &'static str);

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// What a process says first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    pub(super) version: u16,
    pub(super) rank: u32,
    pub(super) num_ranks: u32,
    pub(super) token: Vec<u8>,
}

impl Greeting {
    pub(super) fn encode(&self) -> Vec<u8> {
        debug_assert!(self.token.len() <= TOKEN_LEN_MAX);
        let mut bytes = Vec::from(MAGIC);
        bytes.extend(self.version.to_le_bytes());
        // CAST: TOKEN_LEN_MAX fits.
        bytes.extend((self.token.len() as u16).to_le_bytes());
        bytes.extend(self.rank.to_le_bytes());
        bytes.extend(self.num_ranks.to_le_bytes());
        bytes.extend(&self.token);
        bytes
    }

    /// A greeting and its length; none while bytes are missing.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Broken> {
        let seen = bytes.len().min(MAGIC.len());
        if bytes[..seen] != MAGIC[..seen] {
            return Err(Broken("magic"));
        }
        if bytes.len() < GREETING_LEN {
            return Ok(None);
        }
        let token_len = usize::from(u16_at(bytes, 10));
        if token_len > TOKEN_LEN_MAX {
            return Err(Broken("token length"));
        }
        let len = GREETING_LEN + token_len;
        let Some(token) = bytes.get(GREETING_LEN..len) else { return Ok(None) };
        let greeting = Self {
            version: u16_at(bytes, 8),
            rank: u32_at(bytes, 12),
            num_ranks: u32_at(bytes, 16),
            token: token.to_vec(),
        };
        Ok(Some((greeting, len)))
    }
}

/// Encodes the answer to a greeting.
pub(super) fn encode_answer(refusal: Option<Refusal>) -> Vec<u8> {
    let (code, value) = match refusal {
        None => (0, 0),
        Some(Refusal::Version { theirs, .. }) => (1, theirs),
        Some(Refusal::Token) => (2, 0),
        Some(Refusal::WorldSize { expected }) => (3, expected),
        Some(Refusal::RankRange { num_ranks }) => (4, num_ranks),
        Some(Refusal::RankTaken) => (5, 0),
        Some(Refusal::Malformed) => (6, 0),
        Some(Refusal::Unknown { code }) => (code, 0),
    };
    let mut bytes = Vec::from(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(code.to_le_bytes());
    bytes.extend(u32::to_le_bytes(value));
    bytes
}

/// Parses the answer to a greeting: a refusal, or none.
pub(super) fn parse_answer(bytes: &[u8; ANSWER_LEN]) -> Result<Option<Refusal>, Broken> {
    if bytes[..8] != MAGIC {
        return Err(Broken("magic"));
    }
    let value = u32_at(bytes, 12);
    Ok(match u16_at(bytes, 10) {
        0 if u16_at(bytes, 8) == VERSION => None,
        0 => return Err(Broken("version")),
        1 => Some(Refusal::Version { theirs: value, ours: VERSION.into() }),
        2 => Some(Refusal::Token),
        3 => Some(Refusal::WorldSize { expected: value }),
        4 => Some(Refusal::RankRange { num_ranks: value }),
        5 => Some(Refusal::RankTaken),
        6 => Some(Refusal::Malformed),
        code => Some(Refusal::Unknown { code }),
    })
}

/// What a record means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// To the hub: my blob.
    Gather = 1,
    /// From the hub: all blobs, each behind its length.
    Gathered = 2,
    /// From the hub: these ranks did not come, 4 bytes each.
    Missing = 3,
    /// From the hub: this rank is gone, 4 bytes.
    Left = 4,
}

/// The fixed part of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: Kind,
    pub(super) budget_ms: u32,
    pub(super) key_len: usize,
    pub(super) body_len: usize,
}

impl Head {
    /// Parses the fixed part; a body above `body_len_max` is refused before it is kept.
    pub(super) fn parse(bytes: &[u8; RECORD_LEN], body_len_max: usize) -> Result<Self, Broken> {
        let kind = match bytes[0] {
            1 => Kind::Gather,
            2 => Kind::Gathered,
            3 => Kind::Missing,
            4 => Kind::Left,
            _ => return Err(Broken("record kind")),
        };
        let (key_len, body_len) = (usize::from(bytes[1]), u32_at(bytes, 8) as usize);
        if u16_at(bytes, 2) != 0 {
            return Err(Broken("reserved bytes"));
        }
        if key_len > KEY_LEN_MAX {
            return Err(Broken("key length"));
        }
        if body_len > body_len_max {
            return Err(Broken("body length"));
        }
        Ok(Self { kind, budget_ms: u32_at(bytes, 4), key_len, body_len })
    }

    pub(super) fn total(&self) -> usize {
        RECORD_LEN + self.key_len + self.body_len
    }
}

/// Encodes a record; lengths are the caller's to check.
pub(super) fn encode_record(kind: Kind, budget_ms: u32, key: &[u8], body: &[u8]) -> Vec<u8> {
    debug_assert!(key.len() <= KEY_LEN_MAX);
    let mut bytes = Vec::with_capacity(RECORD_LEN + key.len() + body.len());
    // CAST: KEY_LEN_MAX fits a byte; bodies are at most 512 blobs of BLOB_LEN_MAX, which fits 32 bits.
    bytes.extend([kind as u8, key.len() as u8, 0, 0]);
    bytes.extend(budget_ms.to_le_bytes());
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(key);
    bytes.extend(body);
    bytes
}

/// Longest body that a hub of `num_ranks` sends.
pub(super) fn gathered_len_max(num_ranks: u32) -> usize {
    num_ranks as usize * (4 + BLOB_LEN_MAX)
}

/// Puts blobs behind each other, each behind its length.
pub(super) fn join_blobs<'a>(blobs: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut body = Vec::new();
    for blob in blobs {
        // CAST: at most BLOB_LEN_MAX.
        body.extend((blob.len() as u32).to_le_bytes());
        body.extend(blob);
    }
    body
}

/// The opposite of [`join_blobs`]; exactly `count` blobs, nothing behind them.
pub(super) fn split_blobs(mut body: &[u8], count: u32) -> Result<Vec<Vec<u8>>, Broken> {
    let mut blobs = Vec::new();
    for _ in 0..count {
        let Some((len, rest)) = body.split_first_chunk::<4>() else { return Err(Broken("blob count")) };
        let len = u32::from_le_bytes(*len) as usize;
        let Some((blob, rest)) = rest.split_at_checked(len) else { return Err(Broken("blob length")) };
        blobs.push(blob.to_vec());
        body = rest;
    }
    if body.is_empty() { Ok(blobs) } else { Err(Broken("bytes behind the last blob")) }
}

/// Ranks as 4 bytes each.
pub(super) fn join_ranks(ranks: &[Rank]) -> Vec<u8> {
    ranks.iter().flat_map(|rank| u32::from(rank.0).to_le_bytes()).collect()
}

/// The opposite of [`join_ranks`].
pub(super) fn split_ranks(body: &[u8]) -> Result<Vec<Rank>, Broken> {
    if !body.len().is_multiple_of(4) {
        return Err(Broken("rank list"));
    }
    let rank = |bytes: &[u8]| u16::try_from(u32_at(bytes, 0)).map(Rank).map_err(|_| Broken("rank"));
    body.chunks_exact(4).map(rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_greeting_has_the_published_bytes() {
        let greeting = Greeting { version: 1, rank: 0x0203, num_ranks: 8, token: b"tok".to_vec() };
        let bytes = *b"ibexrdv\0\x01\x00\x03\x00\x03\x02\x00\x00\x08\x00\x00\x00tok";
        assert_eq!(greeting.encode(), bytes);
        for len in 0..bytes.len() {
            assert_eq!(Greeting::parse(&bytes[..len]), Ok(None), "{len} bytes are not all");
        }
        assert_eq!(Greeting::parse(&bytes), Ok(Some((greeting, 23))));
        assert_eq!(Greeting::parse(b"GET / HTTP"), Err(Broken("magic")));
    }

    #[test]
    fn every_refusal_survives_the_wire() {
        let ours = u32::from(VERSION);
        let refusals = [
            Refusal::Version { theirs: 9, ours },
            Refusal::Token,
            Refusal::WorldSize { expected: 8 },
            Refusal::RankRange { num_ranks: 4 },
            Refusal::RankTaken,
            Refusal::Malformed,
            Refusal::Unknown { code: 77 },
        ];
        for refusal in refusals.map(Some).into_iter().chain([None]) {
            let bytes: [u8; ANSWER_LEN] = encode_answer(refusal).try_into().unwrap();
            assert_eq!(parse_answer(&bytes), Ok(refusal));
        }
    }

    #[test]
    fn lengths_are_refused_before_they_are_believed() {
        let head = |body_len: u32, key_len: u8, reserved: u8| {
            let mut bytes = [1, key_len, reserved, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            bytes[8..].copy_from_slice(&body_len.to_le_bytes());
            Head::parse(&bytes, 100)
        };
        assert_eq!(head(100, 64, 0).map(|head| head.total()), Ok(12 + 64 + 100));
        assert_eq!(head(101, 64, 0), Err(Broken("body length")));
        assert_eq!(head(u32::MAX, 0, 0), Err(Broken("body length")));
        assert_eq!(head(0, 65, 0), Err(Broken("key length")));
        assert_eq!(head(0, 0, 1), Err(Broken("reserved bytes")));
    }

    proptest! {
        #[test]
        fn blobs_come_apart_as_they_were_put_together(
            blobs in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..10),
        ) {
            let body = join_blobs(blobs.iter().map(Vec::as_slice));
            let count = blobs.len() as u32;
            prop_assert_eq!(split_blobs(&body, count), Ok(blobs));
            prop_assert!(split_blobs(&body, count + 1).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Greeting::parse(&bytes);
            let _ = split_blobs(&bytes, 3);
            let _ = split_ranks(&bytes);
            if let Some(answer) = bytes.first_chunk() {
                let _ = parse_answer(answer);
            }
            if let Some(head) = bytes.first_chunk() {
                let _ = Head::parse(head, 10);
            }
        }
    }
}
