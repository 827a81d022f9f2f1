//! What a peer must know to connect: the offer, and its plain bytes between processes.
//!
//! Owns nothing. Bytes come from a peer and are not trusted: they make an offer whose every field is within its
//! limits, or a typed refusal. Whether the offer is meant for this rank is [`Session::connect`]'s to say.
//!
//! ```text
//!  magic "IBXO"  version u16  num_lanes u16  num_channels u16  from u16  to u16
//!  process u64   pid u32   host {boot u128, network u64, processes u64}
//!  port {port_num u8, link u8, gid_index u8, mtu u8, lid u16, gid[16], mac[6]}
//!  control {qpn u32, psn u32}
//!  per lane: region_va u64, combine_va u64, region_rkey u32, combine_rkey u32,
//!            per channel {qpn u32, psn u32},
//!            region_handle {len u16, bytes}, combine_handle {len u16, bytes}
//! ```
//!
//! Everything is little-endian.
//!
//! [`Session::connect`]: crate::session::Session::connect

use ibex_abi::types::{Gid, Lid, Mac, PathMtu, Psn, QpNum};
use ibex_hca::{LinkLayer, PortInfo};

use super::identity::HostId;
use crate::config::{CHANNELS_MAX, LANES_MAX, NUM_RANKS_MAX};
use crate::ids::Rank;

const MAGIC: [u8; 4] = *b"IBXO";
/// Version of the bytes.
const VERSION: u16 = 2;
/// Longest handle of exported memory.
const HANDLE_LEN_MAX: usize = 256;
/// Numbers of queue pairs and packets have 24 bits.
const BITS_24: u64 = (1 << 24) - 1;

/// One queue pair of an [`Offer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueOffer {
    /// Its number.
    pub qpn: QpNum,
    /// The first sequence number it will send.
    pub psn: Psn,
}

/// Handles by which a peer of the same host can map what it may write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mappings {
    /// The peer's region here.
    pub region: Vec<u8>,
    /// The combine slab here.
    pub combine: Vec<u8>,
}

/// One lane of an [`Offer`]: where the peer may write, and with which keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneOffer {
    /// The peer's region here.
    pub region_va: u64,
    /// Key to it.
    pub region_rkey: u32,
    /// The combine slab here.
    pub combine_va: u64,
    /// Key to it.
    pub combine_rkey: u32,
    /// One per channel.
    pub queues: Vec<QueueOffer>,
    /// For a peer in another process of this host, if this GPU shares its memory.
    pub mappings: Option<Mappings>,
}

/// What a peer must know to connect to this rank; plain data, made by [`Session::offer`].
///
/// [`Session::offer`]: crate::session::Session::offer
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Who offers.
    pub from: Rank,
    /// To whom.
    pub to: Rank,
    /// The process that offers; peers of one process reach each other's memory as it is.
    pub process: u64,
    /// Its number on that host.
    pub pid: u32,
    /// The host of that process; peers of one host may map each other's memory.
    pub host: HostId,
    /// The port.
    pub port: PortInfo,
    /// Per lane.
    pub lanes: Vec<LaneOffer>,
    /// The control queue pair, which carries the sign of life.
    pub control: QueueOffer,
}

/// Why bytes are no offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// They do not begin as an offer does.
    #[error("these bytes are no offer")]
    Magic,
    /// Another version.
    #[error("the offer has version {found}, this build reads {known}")]
    Version {
        /// The version found.
        found: u16,
        /// The version that is read.
        known: u16,
    },
    /// They end too early, or go on after the end.
    #[error("the offer of {len} bytes is too short or too long")]
    Length {
        /// How many bytes there were.
        len: usize,
    },
    /// A field outside its limit.
    #[error("{field} = {value} of an offer is refused: at most {max}")]
    Field {
        /// Which field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// The largest that is valid.
        max: u64,
    },
}

impl Offer {
    /// The bytes that another process's [`Offer::from_bytes`] reads.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::from(MAGIC);
        // CAST: limits of Config keep every count below 2^16.
        let num_channels = self.lanes.first().map_or(0, |lane| lane.queues.len()) as u16;
        for word in [VERSION, self.lanes.len() as u16, num_channels, self.from.0, self.to.0] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.process.to_le_bytes());
        bytes.extend(self.pid.to_le_bytes());
        bytes.extend(self.host.to_bytes());
        let PortInfo { port_num, link, lid, gid, gid_index, mac, mtu } = self.port;
        bytes.extend([port_num, u8::from(link == LinkLayer::Roce), gid_index, mtu.code()]);
        bytes.extend(lid.0.to_le_bytes());
        bytes.extend(gid.0);
        bytes.extend(mac.0);
        put_queue(&mut bytes, &self.control);
        self.lanes.iter().for_each(|lane| put_lane(&mut bytes, lane));
        bytes
    }

    /// Reads what [`Offer::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`OfferError`]: the bytes come from a peer and may be anything.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, OfferError> {
        let mut reader = Reader { rest: bytes, len: bytes.len() };
        if reader.take::<4>()? != MAGIC {
            return Err(OfferError::Magic);
        }
        let found = reader.u16()?;
        if found != VERSION {
            return Err(OfferError::Version { found, known: VERSION });
        }
        let num_lanes = reader.bounded("lanes", LANES_MAX.into())?;
        let num_channels = reader.bounded("channels", CHANNELS_MAX.into())?;
        let offer = Self {
            // CAST: at most NUM_RANKS_MAX.
            from: Rank(reader.bounded("from", u64::from(NUM_RANKS_MAX) - 1)? as u16),
            to: Rank(reader.bounded("to", u64::from(NUM_RANKS_MAX) - 1)? as u16),
            process: u64::from_le_bytes(reader.take()?),
            pid: reader.u32()?,
            host: HostId::from_bytes(&reader.take()?),
            port: reader.port()?,
            control: reader.queue()?,
            lanes: (0..num_lanes).map(|_| reader.lane(num_channels)).collect::<Result<_, _>>()?,
        };
        if !reader.rest.is_empty() {
            return Err(OfferError::Length { len: bytes.len() });
        }
        Ok(offer)
    }
}

fn put_queue(bytes: &mut Vec<u8>, queue: &QueueOffer) {
    bytes.extend(queue.qpn.get().to_le_bytes());
    bytes.extend(queue.psn.get().to_le_bytes());
}

fn put_lane(bytes: &mut Vec<u8>, lane: &LaneOffer) {
    bytes.extend(lane.region_va.to_le_bytes());
    bytes.extend(lane.combine_va.to_le_bytes());
    bytes.extend(lane.region_rkey.to_le_bytes());
    bytes.extend(lane.combine_rkey.to_le_bytes());
    lane.queues.iter().for_each(|queue| put_queue(bytes, queue));
    let handles = lane.mappings.as_ref().map_or([&[][..]; 2], |m| [&m.region, &m.combine]);
    for handle in handles {
        debug_assert!(handle.len() <= HANDLE_LEN_MAX);
        // CAST: HANDLE_LEN_MAX fits.
        bytes.extend((handle.len() as u16).to_le_bytes());
        bytes.extend(handle);
    }
}

/// Takes fields off the front of bytes that may end anywhere.
struct Reader<'a> {
    rest: &'a [u8],
    len: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], OfferError> {
        let (field, rest) = self.rest.split_first_chunk().ok_or(OfferError::Length { len: self.len })?;
        self.rest = rest;
        Ok(*field)
    }

    fn u16(&mut self) -> Result<u16, OfferError> {
        Ok(u16::from_le_bytes(self.take()?))
    }

    fn u32(&mut self) -> Result<u32, OfferError> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn bounded(&mut self, field: &'static str, max: u64) -> Result<u64, OfferError> {
        check(field, self.u16()?.into(), max)
    }

    fn port(&mut self) -> Result<PortInfo, OfferError> {
        let [port_num, link, gid_index, mtu] = self.take()?;
        Ok(PortInfo {
            port_num,
            link: match check("link", link.into(), 1)? {
                0 => LinkLayer::Ib,
                _ => LinkLayer::Roce,
            },
            lid: Lid(self.u16()?),
            gid: Gid(self.take()?),
            gid_index,
            mac: Mac(self.take()?),
            mtu: PathMtu::from_code(mtu.into()).ok_or(OfferError::Field {
                field: "mtu",
                value: mtu.into(),
                max: 5,
            })?,
        })
    }

    fn queue(&mut self) -> Result<QueueOffer, OfferError> {
        let (qpn, psn) = (self.u32()?, self.u32()?);
        check("qpn", qpn.into(), BITS_24)?;
        check("psn", psn.into(), BITS_24)?;
        Ok(QueueOffer { qpn: QpNum::new(qpn), psn: Psn::new(psn) })
    }

    fn handle(&mut self) -> Result<Vec<u8>, OfferError> {
        // CAST: HANDLE_LEN_MAX fits.
        let len = self.bounded("handle length", HANDLE_LEN_MAX as u64)? as usize;
        let (handle, rest) = self.rest.split_at_checked(len).ok_or(OfferError::Length { len: self.len })?;
        self.rest = rest;
        Ok(handle.to_vec())
    }

    fn lane(&mut self, num_channels: u64) -> Result<LaneOffer, OfferError> {
        let (region_va, combine_va) = (u64::from_le_bytes(self.take()?), u64::from_le_bytes(self.take()?));
        let (region_rkey, combine_rkey) = (self.u32()?, self.u32()?);
        let queues = (0..num_channels).map(|_| self.queue()).collect::<Result<_, _>>()?;
        let (region, combine) = (self.handle()?, self.handle()?);
        let has_both = !region.is_empty() && !combine.is_empty();
        let mappings = has_both.then_some(Mappings { region, combine });
        Ok(LaneOffer { region_va, region_rkey, combine_va, combine_rkey, queues, mappings })
    }
}

fn check(field: &'static str, value: u64, max: u64) -> Result<u64, OfferError> {
    if value <= max { Ok(value) } else { Err(OfferError::Field { field, value, max }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Offer {
        let queue = |n| QueueOffer { qpn: QpNum::new(n), psn: Psn::new(n + 1) };
        let lane = |mappings| LaneOffer {
            region_va: 0x1122_3344_5566_7788,
            region_rkey: 7,
            combine_va: u64::MAX,
            combine_rkey: u32::MAX,
            queues: vec![queue(1), queue(0xff_fffe)],
            mappings,
        };
        let mappings = Mappings { region: vec![1; 48], combine: vec![2; HANDLE_LEN_MAX] };
        Offer {
            from: Rank(3),
            to: Rank(511),
            process: 9,
            pid: 10,
            host: HostId { boot: 1 << 100, network: 2, processes: 3 },
            port: PortInfo {
                port_num: 1,
                link: LinkLayer::Roce,
                lid: Lid(0),
                gid: Gid([9; 16]),
                gid_index: 0,
                mac: Mac([1, 2, 3, 4, 5, 6]),
                mtu: PathMtu::B4096,
            },
            lanes: vec![lane(None), lane(Some(mappings))],
            control: queue(77),
        }
    }

    #[test]
    fn an_offer_survives_its_bytes_and_no_part_of_them_is_one() {
        let bytes = sample().to_bytes();
        assert_eq!(Offer::from_bytes(&bytes), Ok(sample()));
        for len in 0..bytes.len() {
            let part = Offer::from_bytes(&bytes[..len]);
            assert!(matches!(part, Err(OfferError::Length { .. })), "{len}: {part:?}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(Offer::from_bytes(&longer), Err(OfferError::Length { len: longer.len() }));
    }

    #[test]
    fn fields_outside_their_limits_are_refused_by_name() {
        let with = |at: usize, value: &[u8]| {
            let mut bytes = sample().to_bytes();
            bytes[at..at + value.len()].copy_from_slice(value);
            Offer::from_bytes(&bytes).unwrap_err()
        };
        assert_eq!(with(0, b"X"), OfferError::Magic);
        assert_eq!(with(4, &[1, 0]), OfferError::Version { found: 1, known: 2 });
        let refused = |field, value, max| OfferError::Field { field, value, max };
        assert_eq!(with(6, &[9, 0]), refused("lanes", 9, 8));
        assert_eq!(with(8, &[17, 0]), refused("channels", 17, 16));
        assert_eq!(with(10, &[0, 2]), refused("from", 512, 511));
        assert_eq!(with(12, &[0xff, 0xff]), refused("to", 65535, 511));
        // Behind process and host: the port.
        assert_eq!(with(14 + 12 + 32 + 1, &[2]), refused("link", 2, 1));
        assert_eq!(with(14 + 12 + 32 + 3, &[6]), refused("mtu", 6, 5));
        assert_eq!(with(14 + 12 + 32 + 28 + 3, &[1]), refused("qpn", (1 << 24) + 77, BITS_24));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            at in 0_usize..400, bytes in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let _ = Offer::from_bytes(&bytes);
            let mut broken = sample().to_bytes();
            let at = at % broken.len();
            let len = bytes.len().min(broken.len() - at);
            broken[at..at + len].copy_from_slice(&bytes[..len]);
            if let Ok(offer) = Offer::from_bytes(&broken) {
                prop_assert_eq!(Offer::from_bytes(&offer.to_bytes()), Ok(offer));
            }
        }
    }
}
