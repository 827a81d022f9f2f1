//! How a process is reached, as its record says it, both ways.

use ibex_abi::types::{Gid, Lid, Mac, Psn};
use ibex_hca::{LinkLayer, PortAddress, PortInfo};
use ibex_metadata::ids::InstanceId;
use ibex_metadata::record::{self, Device, EpIbgda, Identity, PeerRecord, RecordState, Way};
use ibex_metadata::store::Snapshot;

use super::TransferError;

/// Writes this process's port and its queue pairs, by peer slot, into its record.
pub(crate) fn describe(port: &PortInfo, qpns: Vec<u32>, record: &mut PeerRecord) {
    let (link_layer, way_port) = match port.link {
        LinkLayer::Ib => (record::LinkLayer::InfiniBand, record::PortAddress::Lid(port.lid.0)),
        LinkLayer::Roce => (record::LinkLayer::Ethernet, record::PortAddress::Gid(port.gid.0)),
    };
    record.devices = vec![Device {
        name: "hca0".into(),
        link_layer,
        lid: port.lid.0,
        gid: port.gid.0,
        // Where a fabric tells ports apart by more than the GID, it is by this.
        eid: port.mac.0.to_vec(),
        port: port.port_num,
        ..Device::default()
    }];
    let way = EpIbgda { qpns, port: Some(way_port), ..EpIbgda::default() };
    record.transports.retain(|transport| !matches!(transport.way, Way::EpIbgda(_)));
    record.transports.push(Way::EpIbgda(way).into());
}

pub(super) fn unreachable_peer(snapshot: &Snapshot, missing: &'static str) -> TransferError {
    TransferError::Unreachable { name: snapshot.name.clone(), missing }
}

/// Who is at the other end, where, and which queue pair it has for the peer in `slot`.
pub(super) fn endpoint(
    snapshot: &Snapshot,
    slot: u32,
) -> Result<(InstanceId, PortAddress, u32), TransferError> {
    let missing = |what| unreachable_peer(snapshot, what);
    if snapshot.record.state == RecordState::Left {
        return Err(missing("an owner who stays"));
    }
    let Identity::Instance(instance) = snapshot.identity else { return Err(missing("an instance id")) };
    let device = snapshot.record.devices.first().ok_or_else(|| missing("a device"))?;
    let ways = snapshot.record.transports.iter();
    let mut ways = ways.filter_map(|transport| match &transport.way {
        Way::EpIbgda(way) => Some(way),
        _ => None,
    });
    let way = ways.next_back().ok_or_else(|| missing("queue pairs"))?;
    let slot = usize::try_from(slot).unwrap_or(usize::MAX);
    let qpn = way.qpns.get(slot).copied().filter(|qpn| *qpn != 0);
    let qpn = qpn.ok_or_else(|| missing("a queue pair for this slot"))?;
    let mac = device.eid.first_chunk().copied().map(Mac).unwrap_or_default();
    let address = match way.port.ok_or_else(|| missing("a port"))? {
        record::PortAddress::Lid(lid) => {
            PortAddress { link: LinkLayer::Ib, lid: Lid(lid), gid: Gid(device.gid), mac: Mac::default() }
        }
        record::PortAddress::Gid(gid) => {
            PortAddress { link: LinkLayer::Roce, lid: Lid(0), gid: Gid(gid), mac }
        }
    };
    Ok((instance, address, qpn))
}

/// The first sequence number that one end sends to the other. Both ends compute it from what the records say of
/// both, so that it needs no exchange, and a late packet of an earlier pair is far from it.
pub(super) fn first_psn(from: (InstanceId, u32), to: (InstanceId, u32)) -> Psn {
    let bytes = [from, to].map(|(instance, qpn)| (u128::from_be_bytes(instance.to_bytes()), qpn));
    let words = bytes.iter().flat_map(|(id, qpn)| [*id as u64, (*id >> 64) as u64, u64::from(*qpn)]);
    let hash = words.fold(0xcbf2_9ce4_8422_2325_u64, |hash, word| {
        let mixed = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ (mixed >> 29)
    });
    // CAST: the upper 24 bits.
    Psn::new((hash >> 40) as u32)
}
