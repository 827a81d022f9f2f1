//! Bytes of the cells that a keeper writes beside its row: offers, and placements.
//!
//! Owns nothing. Bytes come from peers and are not trusted. Everything is little-endian.
//!
//! ```text
//!  offers:     "IBXF" version u16  instance u128  advert {len u32, bytes}  num u16
//!              per peer {to u16, to_instance u128, attempt u32, offer {len u32, bytes}}    len 0: it failed
//!  placement:  "IBXP" version u16  placement u32  num_experts u32
//!              per expert {num u16, per owner {rank u16, local u16}}
//! ```

use std::collections::BTreeMap;

use crate::config::{NUM_EXPERTS_MAX, NUM_RANKS_MAX, ValidConfig};
use crate::error::ConfigError;
use crate::ids::{LocalExpertIdx, Rank};
use crate::membership::{CellError, Instance};
use crate::placement::Placement;

const OFFERS: [u8; 4] = *b"IBXF";
const PLACEMENT: [u8; 4] = *b"IBXP";
/// Version of the bytes.
const VERSION: u16 = 1;
/// Longest advert or offer: a few queue pairs per lane, and handles of exported memory.
const BLOB_LEN_MAX: u32 = 1 << 16;

/// What one rank offers to one incarnation of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PeerOffer {
    /// For which incarnation.
    pub(super) to: Instance,
    /// Which attempt of the pair this belongs to.
    pub(super) attempt: u32,
    /// The offer; empty if this side could not make it or connect.
    pub(super) offer: Vec<u8>,
}

/// What one incarnation of a rank offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct OffersCell {
    /// Who offers.
    pub(super) instance: Instance,
    /// How the fabric finds its port.
    pub(super) advert: Vec<u8>,
    /// By peer.
    pub(super) to: BTreeMap<Rank, PeerOffer>,
}

impl OffersCell {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = header(OFFERS);
        bytes.extend(self.instance.0.to_le_bytes());
        put_blob(&mut bytes, &self.advert);
        // CAST: one per rank at most.
        bytes.extend((self.to.len() as u16).to_le_bytes());
        for (rank, offer) in &self.to {
            bytes.extend(rank.0.to_le_bytes());
            bytes.extend(offer.to.0.to_le_bytes());
            bytes.extend(offer.attempt.to_le_bytes());
            put_blob(&mut bytes, &offer.offer);
        }
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, CellError> {
        let mut r = Reader::new(bytes, OFFERS, "offers cell")?;
        let (instance, advert) = (Instance(u128::from_le_bytes(r.take()?)), r.blob("advert length")?);
        let num = r.u16("offers", NUM_RANKS_MAX)?;
        let mut to = BTreeMap::new();
        for _ in 0..num {
            let rank = Rank(r.u16("offer to", NUM_RANKS_MAX - 1)?);
            let instance = Instance(u128::from_le_bytes(r.take()?));
            let attempt = u32::from_le_bytes(r.take()?);
            to.insert(rank, PeerOffer { to: instance, attempt, offer: r.blob("offer length")? });
        }
        r.end(Self { instance, advert, to })
    }
}

/// Why bytes are no placement of this group.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlacementError {
    #[error(transparent)]
    Cell(#[from] CellError),
    #[error(transparent)]
    Config(#[from] ConfigError),
}

pub(super) fn placement_to_bytes(placement: &Placement) -> Vec<u8> {
    let mut bytes = header(PLACEMENT);
    bytes.extend(placement.version().to_le_bytes());
    // CAST: at most NUM_EXPERTS_MAX experts, and one owner per rank.
    bytes.extend((placement.owners().len() as u32).to_le_bytes());
    for owners in placement.owners() {
        bytes.extend((owners.len() as u16).to_le_bytes());
        for (rank, local) in owners {
            bytes.extend(rank.0.to_le_bytes());
            bytes.extend(local.0.to_le_bytes());
        }
    }
    bytes
}

pub(super) fn placement_from_bytes(config: &ValidConfig, bytes: &[u8]) -> Result<Placement, PlacementError> {
    let mut r = Reader::new(bytes, PLACEMENT, "placement")?;
    let version = u32::from_le_bytes(r.take()?);
    let num_experts = u32::from_le_bytes(r.take()?);
    check("experts", num_experts, NUM_EXPERTS_MAX)?;
    let mut owners = Vec::new();
    for _ in 0..num_experts {
        let num = r.u16("owners", NUM_RANKS_MAX)?;
        let owner = |r: &mut Reader<'_>| -> Result<_, CellError> {
            let rank = Rank(r.u16("owner", NUM_RANKS_MAX - 1)?);
            Ok((rank, LocalExpertIdx(u16::from_le_bytes(r.take()?))))
        };
        owners.push((0..num).map(|_| owner(&mut r)).collect::<Result<Vec<_>, _>>()?);
    }
    r.end(())?;
    Ok(Placement::new(config, version, owners)?)
}

fn header(magic: [u8; 4]) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes
}

fn put_blob(bytes: &mut Vec<u8>, blob: &[u8]) {
    debug_assert!(blob.len() <= BLOB_LEN_MAX as usize);
    // CAST: BLOB_LEN_MAX fits.
    bytes.extend((blob.len() as u32).to_le_bytes());
    bytes.extend(blob);
}

/// Takes fields off the front of bytes that may end anywhere.
struct Reader<'a> {
    rest: &'a [u8],
    len: usize,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8], magic: [u8; 4], what: &'static str) -> Result<Self, CellError> {
        let mut reader = Self { rest: bytes, len: bytes.len() };
        if reader.take::<4>()? != magic {
            return Err(CellError::Magic { what });
        }
        let found = u16::from_le_bytes(reader.take()?);
        if found == VERSION { Ok(reader) } else { Err(CellError::Version { found, known: VERSION }) }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], CellError> {
        let (field, rest) = self.rest.split_first_chunk().ok_or(CellError::Length { len: self.len })?;
        self.rest = rest;
        Ok(*field)
    }

    fn u16(&mut self, field: &'static str, max: u32) -> Result<u16, CellError> {
        let value = u16::from_le_bytes(self.take()?);
        check(field, value.into(), max)?;
        Ok(value)
    }

    fn blob(&mut self, field: &'static str) -> Result<Vec<u8>, CellError> {
        let len = u32::from_le_bytes(self.take()?);
        check(field, len, BLOB_LEN_MAX)?;
        // CAST: BLOB_LEN_MAX fits.
        let split = self.rest.split_at_checked(len as usize);
        let (blob, rest) = split.ok_or(CellError::Length { len: self.len })?;
        self.rest = rest;
        Ok(blob.to_vec())
    }

    fn end<T>(self, value: T) -> Result<T, CellError> {
        if self.rest.is_empty() { Ok(value) } else { Err(CellError::Length { len: self.len }) }
    }
}

fn check(field: &'static str, value: u32, max: u32) -> Result<(), CellError> {
    if value <= max {
        return Ok(());
    }
    Err(CellError::Field { field, value: value.into(), max: max.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::membership::RankSet;
    use proptest::prelude::*;

    fn offers() -> OffersCell {
        let offer = |n| PeerOffer { to: Instance(n), attempt: 2, offer: vec![1; n as usize] };
        let to = BTreeMap::from([(Rank(0), offer(0)), (Rank(511), offer(70))]);
        OffersCell { instance: Instance(u128::MAX), advert: vec![9; 3], to }
    }

    #[test]
    fn offers_survive_their_bytes_and_no_part_of_them_is_one() {
        let bytes = offers().to_bytes();
        assert_eq!(OffersCell::from_bytes(&bytes), Ok(offers()));
        for len in 0..bytes.len() {
            assert_eq!(OffersCell::from_bytes(&bytes[..len]), Err(CellError::Length { len }));
        }
        let mut long = bytes.clone();
        long[22..26].copy_from_slice(&(BLOB_LEN_MAX + 1).to_le_bytes());
        let refused = CellError::Field { field: "advert length", value: 65_537, max: 65_536 };
        assert_eq!(OffersCell::from_bytes(&long), Err(refused));
    }

    #[test]
    fn a_placement_survives_its_bytes_if_it_fits_the_group() {
        let config = |num_ranks| {
            let config = Config { num_ranks, num_experts: 7, max_topk: 2, ..Config::default() };
            config.validate().unwrap()
        };
        let placement = Placement::contiguous(&config(3), 5, &RankSet::first(3)).unwrap();
        let bytes = placement_to_bytes(&placement);
        assert_eq!(placement_from_bytes(&config(3), &bytes).unwrap(), placement);
        let refused = placement_from_bytes(&config(2), &bytes).unwrap_err();
        assert!(matches!(refused, PlacementError::Config(_)), "{refused}");
        for len in 0..bytes.len() {
            assert!(placement_from_bytes(&config(3), &bytes[..len]).is_err());
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            at in 0_usize..300, bytes in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut cell = offers().to_bytes();
            let at = at % cell.len();
            let len = bytes.len().min(cell.len() - at);
            cell[at..at + len].copy_from_slice(&bytes[..len]);
            if let Ok(offers) = OffersCell::from_bytes(&cell) {
                prop_assert_eq!(OffersCell::from_bytes(&offers.to_bytes()), Ok(offers));
            }
        }
    }
}
