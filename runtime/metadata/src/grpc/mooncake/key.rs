//! Keys of Mooncake's HTTP metadata, and where in the store they are.

use sha2::{Digest, Sha256};

use crate::error::{InputError, Result};
use crate::grpc::views::parcel::hex;
use crate::limits::NAME_PART_LEN_MAX;
use crate::name::RecordName;

/// Where everything of Mooncake's is.
const CLUSTER: &str = "mooncake";
/// Characters of a key.
const KEY_LEN_MAX: usize = 1024;
/// Hexadecimal digits that stand for a key too long for a name.
const DIGEST_LEN: usize = 48;

/// A key, and the name of the record or the cell behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Key {
    /// A segment's descriptor: a record.
    Segment { name: RecordName, text: String },
    /// Anything else: a cell.
    Other { name: RecordName, text: String },
}

/// Which of a peer's keys is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// Where its memory is.
    Segment,
    /// Where its handshake daemon listens.
    RpcMeta,
}

impl Key {
    /// The key in the query of a request.
    pub(super) fn from_query(query: &str) -> Result<Self> {
        let value = query.split('&').find_map(|pair| pair.strip_prefix("key=")).unwrap_or_default();
        let refusal = |limit| InputError::new("key", value, limit);
        let text = unescaped(value).ok_or_else(|| refusal("percent-encoded utf-8"))?;
        let text = text.trim();
        if text.is_empty() {
            return Err(refusal("given").into());
        }
        if text.len() > KEY_LEN_MAX {
            return Err(refusal("at most 1024 bytes").into());
        }
        Ok(Self::parse(text)?)
    }

    /// `mooncake/ram/NAME`, or `mooncake/CLUSTER/ram/NAME` where clusters share a server.
    fn parse(text: &str) -> Result<Self, InputError> {
        let rest = text.strip_prefix("mooncake/").unwrap_or_default();
        let segment = match rest.split_once("ram/") {
            Some(("", segment)) => Some(segment.to_owned()),
            Some((cluster, segment)) if cluster.ends_with('/') => Some(format!("{cluster}{segment}")),
            _ => None,
        };
        let (text_kept, part) =
            (text.to_owned(), |group, part: &str| RecordName::new(CLUSTER, group, &name_part(part)));
        Ok(match segment {
            Some(segment) if !segment.is_empty() => {
                Self::Segment { name: part("segments", &segment)?, text: text_kept }
            }
            _ => Self::Other { name: part("keys", text)?, text: text_kept },
        })
    }

    /// The segment of the engine whose `rpc_meta` this key is.
    pub(super) fn segment(&self) -> Option<RecordName> {
        let Self::Other { text, .. } = self else { return None };
        match Self::parse(&text.replacen("rpc_meta/", "ram/", 1)).ok()? {
            Self::Segment { name, .. } => Some(name),
            Self::Other { .. } => None,
        }
    }

    /// The session that a key of the default cluster speaks of.
    pub(super) fn session(&self) -> Option<(&str, What)> {
        match self {
            Self::Segment { text, .. } => Some((text.strip_prefix("mooncake/ram/")?, What::Segment)),
            Self::Other { text, .. } => Some((text.strip_prefix("mooncake/rpc_meta/")?, What::RpcMeta)),
        }
    }
}

/// A readable part of a name, another one for every key: what names may not hold stands as `_` and two
/// hexadecimal digits; a key too long for that is `_h` and a digest.
fn name_part(text: &str) -> String {
    let mut part = String::new();
    for (index, byte) in text.bytes().enumerate() {
        let is_plain = byte.is_ascii_alphanumeric() || byte == b'-' || (byte == b'.' && index > 0);
        if is_plain {
            part.push(char::from(byte));
        } else {
            part.push('_');
            part.push_str(&hex(&[byte]));
        }
    }
    if part.len() <= NAME_PART_LEN_MAX {
        return part;
    }
    format!("_h{}", &hex(&Sha256::digest(text))[..DIGEST_LEN])
}

/// Percent-decoded text; `+` is a space, as in forms.
fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                u8::try_from(high * 16 + low).ok()?
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(query: &str) -> (bool, String) {
        match Key::from_query(query).unwrap() {
            Key::Segment { name, .. } => (true, name.to_string()),
            Key::Other { name, .. } => (false, name.to_string()),
        }
    }

    #[test]
    fn segments_are_records_and_the_rest_are_cells() {
        let host = "127.0.0.1%3A17811";
        let wanted = (true, "mooncake/segments/127.0.0.1_3a17811".to_owned());
        assert_eq!(name(&format!("key=mooncake%2Fram%2F{host}")), wanted);
        assert_eq!(name("x=1&key=mooncake/ram/a").1, "mooncake/segments/a");
        assert_eq!(name("key=mooncake/c1/ram/a").1, "mooncake/segments/c1_2fa");
        assert_eq!(name("key=mooncake/rpc_meta/a").1, "mooncake/keys/mooncake_2frpc_5fmeta_2fa");
        for other in ["key=mooncake/ram/", "key=ram/a", "key=x", "key=mooncake/program/a", "key=.."] {
            assert!(!name(other).0, "{other}");
        }
    }

    #[test]
    fn an_engines_keys_belong_together() {
        let segment = |query: &str| Key::from_query(query).unwrap().segment().map(|name| name.to_string());
        assert_eq!(segment("key=mooncake/rpc_meta/a%3A1").as_deref(), Some("mooncake/segments/a_3a1"));
        assert_eq!(segment("key=mooncake/c1/rpc_meta/a").as_deref(), Some("mooncake/segments/c1_2fa"));
        for other in ["key=mooncake/ram/a", "key=mooncake/rpc_meta/", "key=rpc_meta/a", "key=rpc_meta"] {
            assert_eq!(segment(other), None, "{other}");
        }
    }

    #[test]
    fn every_key_has_a_name_of_its_own() {
        let long = "x".repeat(500);
        let keys = ["a/b", "a_2fb", "a b", "a%62", ".a", "_h", &long, &format!("{long}y"), "Ä"];
        let mut names: Vec<_> = keys.iter().map(|key| name_part(key)).collect();
        assert!(names.iter().all(|name| RecordName::new("a", "b", name).is_ok()), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), keys.len());
    }

    #[test]
    fn keys_that_are_none_are_refused_by_name() {
        let long = format!("key={}", "x".repeat(KEY_LEN_MAX + 1));
        for bad in ["", "key=", "key=%20", "key=%", "key=%4", "key=%zz", "key=%ff", "other=x", &long] {
            let error = Key::from_query(bad).unwrap_err();
            assert!(error.to_string().starts_with("key = "), "{bad}: {error}");
        }
    }
}
