//! Which port and GID a device is used with, and what it can do.
//!
//! Nothing is owned: everything is asked of an open context, once, when a device is opened.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use ibex_abi::prm::{self, Op};
use ibex_abi::types::{Gid, Mac};
use ibex_mlx5dv_sys as sys;

use super::Mlx5Config;
use super::devices::{Opened, PortReport, PortState, answered};
use super::error::{OpenError, refused};
use crate::{HcaCaps, HcaError, LinkLayer, PortInfo};

/// Most ports of a device.
const PORTS_MAX: u8 = 2;
/// Kinds of GIDs, as rdma-core 44 numbers them (verbs.h `ibv_gid_type`).
const GID_ROCE_V2: u32 = 2;
/// Capability groups, the upper bits of `op_mod`; the lowest says "as in force".
const GENERAL: u64 = 0;
const ATOMIC: u64 = 3;
const IN_FORCE: u64 = 1;
/// Operands of 8-byte atomics are in the host's byte order.
const HOST_ORDER: u64 = 1;
/// Log2 of the smallest completion queue that drivers are seen to create: the kernel's verbs take two entries.
const LOG_MIN_CQ: u8 = 1;
/// Bytes of a WQE before its inline payload: control, remote address, the payload's header.
const INLINE_OVERHEAD: u16 = 16 + 16 + 4;

/// Chooses the port and its address.
pub(super) fn choose(opened: &Opened, device: &str, config: &Mlx5Config) -> Result<PortInfo, OpenError> {
    let numbers = config.port.map_or(1..=PORTS_MAX, |port| port..=port);
    let is_usable = |port: &PortReport| {
        port.state == PortState::Active && config.link.is_none_or(|link| link == port.link)
    };
    let port = numbers.filter_map(|number| opened.query_port(number).ok()).find(is_usable);
    let Some(port) = port else {
        return Err(OpenError::NoPort { device: device.to_owned(), wanted: config.port });
    };
    let no_gid =
        || OpenError::NoGid { device: device.to_owned(), port: port.number, wanted: config.gid_index };
    let (gid_index, gid) = choose_gid(opened, &port, config.gid_index).ok_or_else(no_gid)?;
    let mac = match port.link {
        LinkLayer::Ib => Mac::default(),
        LinkLayer::Roce => mac_of(opened, port.number, gid_index).unwrap_or_default(),
    };
    let (link, mtu, lid) = (port.link, port.active_mtu, port.lid);
    Ok(PortInfo { port_num: port.number, link, lid, gid, gid_index, mac, mtu })
}

/// The entry to use; on Ethernet one of RoCE v2, the kind of address that reaches farthest first.
fn choose_gid(opened: &Opened, port: &PortReport, wanted: Option<u8>) -> Option<(u8, Gid)> {
    // CAST: at most the 255 that a mailbox names.
    let indices = wanted.map_or(0..=port.num_gids.saturating_sub(1).min(255) as u8, |index| index..=index);
    let entries = indices.filter_map(|index| Some((index, gid_at(opened, port, index)?)));
    match port.link {
        LinkLayer::Ib => entries.map(|(index, (gid, _))| (index, gid)).next(),
        LinkLayer::Roce => entries
            .filter(|(_, (_, kind))| *kind == GID_ROCE_V2)
            .map(|(index, (gid, _))| (index, gid))
            .min_by_key(|(_, gid)| reach(gid)),
    }
}

/// 0 for IPv4, 1 for IPv6, 2 for addresses of the link alone.
fn reach(gid: &Gid) -> u8 {
    let address = std::net::Ipv6Addr::from(gid.0);
    match address.to_ipv4_mapped() {
        Some(_) => 0,
        None if address.is_unicast_link_local() => 2,
        None => 1,
    }
}

/// An entry of the GID table that is not zero, and its kind.
fn gid_at(opened: &Opened, port: &PortReport, index: u8) -> Option<(Gid, u32)> {
    let mut entry = sys::ibv_gid_entry {
        gid: sys::ibv_gid { raw: [0; 16] },
        gid_index: 0,
        port_num: 0,
        gid_type: 0,
        ndev_ifindex: 0,
    };
    // SAFETY: an open context, room for an entry, and its size.
    let code = unsafe {
        let (port, index) = (u32::from(port.number), u32::from(index));
        opened.library()._ibv_query_gid_ex(opened.context(), port, index, &mut entry, 0, size_of_val(&entry))
    };
    answered(code).ok()?;
    // SAFETY: sixteen bytes, whichever way they are looked at.
    let gid = Gid(unsafe { entry.gid.raw });
    (gid != Gid([0; 16])).then_some((gid, entry.gid_type))
}

/// The Ethernet address that packets from a GID carry.
fn mac_of(opened: &Opened, port: u8, index: u8) -> Option<Mac> {
    use prm::{query_roce_address_in as query, query_roce_address_out as reply, roce_addr_layout as addr};
    let (mut input, mut output) = ([0; query::LEN], [0; reply::LEN]);
    prm::set(&mut input, query::OPCODE, Op::QueryRoceAddress.code().into());
    prm::set(&mut input, query::ROCE_ADDRESS_INDEX, index.into());
    prm::set(&mut input, query::VHCA_PORT_NUM, if port > 1 { port.into() } else { 0 });
    general(opened, &input, &mut output).ok()?;
    let entry = prm::part(&output, reply::ROCE_ADDRESS);
    // CAST: fields of 16 and 32 bits.
    let (high, low) =
        (prm::get(entry, addr::SOURCE_MAC_47_32) as u16, prm::get(entry, addr::SOURCE_MAC_31_0) as u32);
    Some(Mac::join(high, low))
}

/// Sends a command that names no object.
fn general(opened: &Opened, input: &[u8], output: &mut [u8]) -> Result<(), HcaError> {
    // CAST: a 16-bit field.
    let opcode = prm::get(input, prm::cmd_in::OPCODE) as u16;
    // SAFETY: an open context; the mailboxes are read and written within their lengths, during the call.
    let answer = unsafe {
        let (from, into) = (input.as_ptr().cast(), output.as_mut_ptr().cast());
        opened.library().mlx5dv_devx_general_cmd(opened.context(), from, input.len(), into, output.len())
    };
    Ok(answered(answer).map_err(|error: io::Error| refused(opcode, &error, output))?)
}

/// One group of capabilities, as in force.
fn group(opened: &Opened, group: u64) -> Result<Vec<u8>, HcaError> {
    use prm::{query_hca_cap_in as query, query_hca_cap_out as reply};
    let mut input = [0; query::LEN];
    prm::set(&mut input, query::OPCODE, Op::QueryHcaCap.code().into());
    prm::set(&mut input, query::OP_MOD, group << 1 | IN_FORCE);
    let mut output = vec![0; reply::LEN];
    general(opened, &input, &mut output)?;
    Ok(output[reply::CAPABILITY.bytes().start..].to_vec())
}

/// What the device can do.
pub(super) fn caps(opened: &Arc<Opened>, link: LinkLayer) -> Result<HcaCaps, HcaError> {
    use prm::{atomic_caps, cmd_hca_cap as cap};
    let general = group(opened, GENERAL)?;
    // CAST: fields of at most 16 bits.
    let (small, wide) = (|field| prm::get(&general, field) as u8, |field| prm::get(&general, field) as u16);
    let has_atomics = prm::get(&general, cap::ATOMIC) == 1;
    // Words that the CPU and GPUs add to as well must be in their byte order.
    let is_host_order = || {
        let atomics = group(opened, ATOMIC)?;
        Ok::<bool, HcaError>(prm::get(&atomics, atomic_caps::ATOMIC_REQ_8B_ENDIANNESS_MODE) == HOST_ORDER)
    };
    Ok(HcaCaps {
        link,
        cqe_version: small(cap::CQE_VERSION),
        log_max_qp_sz: small(cap::LOG_MAX_QP_SZ),
        log_min_cq_sz: LOG_MIN_CQ,
        log_max_cq_sz: small(cap::LOG_MAX_CQ_SZ),
        max_wqe_sz_sq: wide(cap::MAX_WQE_SZ_SQ),
        max_wqe_sz_rq: wide(cap::MAX_WQE_SZ_RQ),
        max_inline: wide(cap::MAX_WQE_SZ_SQ).saturating_sub(INLINE_OVERHEAD),
        log_max_msg: small(cap::LOG_MAX_MSG),
        log_max_rd_atomic: small(cap::LOG_MAX_RA_REQ_QP).min(small(cap::LOG_MAX_RA_RES_QP)),
        atomic: has_atomics && is_host_order()?,
        gid_table_size: wide(cap::GID_TABLE_SIZE),
    })
}

/// Bridges that a device and a PCI function do not share; few is near, and unknown is farthest.
pub(super) fn distance(device: &str, pci: &str) -> usize {
    let place = |path: String| fs::canonicalize(PathBuf::from(path)).ok();
    let one = place(format!("/sys/class/infiniband/{device}/device"));
    let Some((one, other)) = one.zip(place(format!("/sys/bus/pci/devices/{pci}"))) else { return usize::MAX };
    let common = one.iter().zip(other.iter()).take_while(|(a, b)| a == b).count();
    one.iter().count() + other.iter().count() - 2 * common
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_reach_farther_come_first() {
        let gid = |text: &str| Gid(text.parse::<std::net::Ipv6Addr>().unwrap().octets());
        assert_eq!(reach(&gid("::ffff:10.0.0.1")), 0);
        assert_eq!(reach(&gid("2001:db8::1")), 1);
        assert_eq!(reach(&gid("fe80::1")), 2);
    }

    #[test]
    fn what_does_not_exist_is_farthest() {
        assert_eq!(distance("mlx5_ibex_none", "ffff:ff:1f.7"), usize::MAX);
    }
}
