//! Adverts: the plain bytes by which a port becomes known to a fabric of another process.
//!
//! Every kind of fabric puts its own bytes behind one common head, so that an advert of another kind, of
//! another version or of another program is refused by name. What stands in an advert is claimed by a
//! peer: a head that was read is well-formed, not true.
//!
//! ```text
//!  0       4         5      6      7     8     10    26    32      34        36
//!  | magic | version | kind | link | mtu | lid | gid | mac | zero | body_len | body ...
//! ```

use ibex_abi::types::{Gid, Lid, Mac, PathMtu};
use zerocopy::byteorder::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{LinkLayer, PortInfo};

/// First bytes of every advert.
const MAGIC: [u8; 4] = *b"IBXP";
/// Version of the common head and of every body.
const VERSION: u8 = 1;

/// Which fabric an advert belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum AdvertKind {
    /// Shared memory between processes of one host.
    Shm = 1,
    /// RC over RoCEv2 through sockets.
    Udp = 2,
}

/// Why an advert was refused, or could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdvertError {
    /// The ports of this fabric are known within its process only.
    #[error("this fabric lies within one process; its ports need no advert")]
    Local,
    /// The bytes are not an advert.
    #[error("these {len} bytes are no advert: {what}")]
    Malformed {
        /// What is wrong with them.
        what: &'static str,
        /// How many bytes there were.
        len: u64,
    },
    /// The advert has another version.
    #[error("the advert has version {found}; this build reads version {known}")]
    Version {
        /// The version found.
        found: u8,
        /// The one that is read.
        known: u8,
    },
    /// The advert belongs to another kind of fabric.
    #[error("the advert is of kind {found}; this fabric takes kind {wanted} (1 is shm, 2 is udp)")]
    Kind {
        /// The kind found.
        found: u8,
        /// The one that is taken.
        wanted: u8,
    },
    /// A port that is known already has this address.
    #[error("port {port} of this fabric has the address of the advert already")]
    AddressTaken {
        /// The port that has it.
        port: u16,
    },
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 4],
    version: u8,
    kind: u8,
    link: u8,
    mtu: u8,
    lid: U16,
    gid: [u8; 16],
    mac: [u8; 6],
    zero: [u8; 2],
    body_len: U16,
}

const _: () = assert!(size_of::<Head>() == 36);

/// Puts a port's address and its fabric's own bytes together.
///
/// # Panics
/// PANIC: if `body` is 64 KiB or longer; bodies are of fixed size.
pub(super) fn seal(kind: AdvertKind, port: &PortInfo, body: &[u8]) -> Vec<u8> {
    let body_len = u16::try_from(body.len()).expect("an advert's body is short");
    let head = Head {
        magic: MAGIC,
        version: VERSION,
        kind: kind as u8,
        link: match port.link {
            LinkLayer::Ib => 0,
            LinkLayer::Roce => 1,
        },
        mtu: port.mtu.code(),
        lid: U16::new(port.lid.0),
        gid: port.gid.0,
        mac: port.mac.0,
        zero: [0; 2],
        body_len: U16::new(body_len),
    };
    [head.as_bytes(), body].concat()
}

/// Takes an advert of `kind` apart.
pub(super) fn open(kind: AdvertKind, bytes: &[u8]) -> Result<(PortInfo, &[u8]), AdvertError> {
    let len = bytes.len() as u64;
    let malformed = |what| AdvertError::Malformed { what, len };
    let (head, body) = Head::ref_from_prefix(bytes).map_err(|_| malformed("shorter than its head"))?;
    if head.magic != MAGIC {
        return Err(malformed("it does not begin with IBXP"));
    }
    if head.version != VERSION {
        return Err(AdvertError::Version { found: head.version, known: VERSION });
    }
    if head.kind != kind as u8 {
        return Err(AdvertError::Kind { found: head.kind, wanted: kind as u8 });
    }
    let link = match head.link {
        0 => LinkLayer::Ib,
        1 => LinkLayer::Roce,
        _ => return Err(malformed("unknown link layer")),
    };
    let mtu = PathMtu::from_code(head.mtu.into()).ok_or(malformed("unknown MTU"))?;
    if body.len() != usize::from(head.body_len.get()) {
        return Err(malformed("its body has another length than its head says"));
    }
    let (lid, gid, mac) = (Lid(head.lid.get()), Gid(head.gid), Mac(head.mac));
    Ok((PortInfo { port_num: 1, link, lid, gid, gid_index: 0, mac, mtu }, body))
}

/// Body of a fuzz target and of a property test: what opens survives its own bytes.
pub(crate) fn open_arbitrary(bytes: &[u8]) {
    for kind in [AdvertKind::Shm, AdvertKind::Udp] {
        if let Ok((port, body)) = open(kind, bytes) {
            assert_eq!(open(kind, &seal(kind, &port, body)), Ok((port, body)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_opened_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64), kind in 1..3_u8) {
            open_arbitrary(&bytes);
            // Let some of them through to the later checks.
            // CAST: fewer than 64.
            let body_len = [bytes.len().saturating_sub(size_of::<Head>()) as u8, 0];
            let mut near = bytes;
            for (at, right) in [(0, &MAGIC[..]), (4, &[VERSION, kind, 1, 3][..]), (34, &body_len[..])] {
                if let Some(place) = near.get_mut(at..at + right.len()) {
                    place.copy_from_slice(right);
                }
            }
            open_arbitrary(&near);
        }
    }

    fn port() -> PortInfo {
        let (lid, gid, mac) = (Lid(7), Gid([9; 16]), Mac([2, 1, 2, 3, 4, 5]));
        PortInfo { port_num: 1, link: LinkLayer::Roce, lid, gid, gid_index: 0, mac, mtu: PathMtu::B2048 }
    }

    #[test]
    fn what_was_sealed_is_read_back() {
        let bytes = seal(AdvertKind::Udp, &port(), b"body");
        assert_eq!(open(AdvertKind::Udp, &bytes), Ok((port(), &b"body"[..])));
    }

    #[test]
    fn each_flaw_is_refused_with_its_own_reason() {
        let good = seal(AdvertKind::Shm, &port(), b"body");
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            open(AdvertKind::Shm, &bytes).map(|_| ()).unwrap_err()
        };
        assert_eq!(with(4, 9), AdvertError::Version { found: 9, known: 1 });
        assert_eq!(with(5, 2), AdvertError::Kind { found: 2, wanted: 1 });
        for (at, byte) in [(0, 0), (6, 2), (7, 0), (34, 5)] {
            assert!(matches!(with(at, byte), AdvertError::Malformed { len: 40, .. }), "byte {at}");
        }
        for len in 0..good.len() {
            let cut = open(AdvertKind::Shm, &good[..len]);
            assert!(matches!(cut, Err(AdvertError::Malformed { .. })), "{len} bytes");
        }
    }
}
