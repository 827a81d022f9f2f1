//! What the device says about itself.

use ibex_abi::prm::{self, Status};
use ibex_abi::types::Mac;

use super::{CommandSyndrome, Done, Touched, refuse};
use crate::emulated::EmulatedHca;
use crate::emulated::trace::ObjectKind;
use crate::{HcaCaps, LinkLayer};

/// Capability groups, the upper bits of `op_mod`.
const GENERAL: u64 = 0;
const ATOMIC: u64 = 3;
const ROCE: u64 = 4;
const GENERAL_2: u64 = 0x20;

/// States of a port. SPEC: IBTA vol. 1 §14.2.5.6.
const PORT_DOWN: u64 = 1;
const PORT_ACTIVE: u64 = 4;
/// Physical states of a port: it looks for a link, it has one.
const PORT_POLLING: u64 = 2;
const PORT_LINK_UP: u64 = 5;

impl EmulatedHca {
    pub(super) fn query_caps(&self, input: &[u8], output: &mut [u8]) -> Done {
        let group = prm::get(input, prm::query_hca_cap_in::OP_MOD) >> 1;
        let mut caps = [0; prm::cmd_hca_cap::LEN];
        match group {
            GENERAL => general(&self.caps, &mut caps),
            ATOMIC => atomic(&mut caps),
            ROCE => roce(&self.caps, &mut caps),
            GENERAL_2 => {}
            _ => return Err(refuse(Status::BadParam, CommandSyndrome::BadCapability)),
        }
        let start = prm::query_hca_cap_out::CAPABILITY.bytes().start;
        let room = output.len().saturating_sub(start).min(caps.len());
        output[start..start + room].copy_from_slice(&caps[..room]);
        Ok(Touched { kind: ObjectKind::Device, number: None })
    }

    pub(super) fn query_roce_address(&self, input: &[u8], output: &mut [u8]) -> Done {
        use prm::{
            query_roce_address_in as query, query_roce_address_out as reply, roce_addr_layout as addr,
        };
        let idx = prm::get(input, query::ROCE_ADDRESS_INDEX);
        if idx >= self.caps.gid_table_size.into() || self.port.link != LinkLayer::Roce {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadIndex));
        }
        let entry = prm::part_mut(output, reply::ROCE_ADDRESS);
        if idx == u64::from(self.port.gid_index) {
            let Mac([a, b, c, d, e, f]) = self.port.mac;
            prm::set_bytes(entry, addr::SOURCE_L3_ADDRESS, &self.port.gid.0);
            prm::set(entry, addr::SOURCE_MAC_47_32, u16::from_be_bytes([a, b]).into());
            prm::set(entry, addr::SOURCE_MAC_31_0, u32::from_be_bytes([c, d, e, f]).into());
            // RoCE version 2 over IPv4.
            prm::set(entry, addr::ROCE_VERSION, 2);
        }
        Ok(Touched { kind: ObjectKind::Device, number: None })
    }
}

impl EmulatedHca {
    /// Logical and physical state of the port.
    pub(super) fn port_states(&self) -> (u64, u64) {
        if self.is_port_up() { (PORT_ACTIVE, PORT_LINK_UP) } else { (PORT_DOWN, PORT_POLLING) }
    }

    /// State of the port as an InfiniBand subnet manager would have set it.
    pub(super) fn query_vport(&self, input: &[u8], output: &mut [u8]) -> Done {
        use prm::{hca_vport_context as vport, query_hca_vport_context_in as query};
        if self.port.link != LinkLayer::Ib || prm::get(input, query::OTHER_VPORT) != 0 {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadPort));
        }
        // A function with one port may leave its number out.
        if prm::get(input, query::PORT_NUM) > u64::from(self.port.port_num) {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadPort));
        }
        let [.., a, b, c, d, e, f, g, h] = self.port.gid.0;
        let guid = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        let (state, physical) = self.port_states();
        let context = prm::part_mut(output, prm::query_hca_vport_context_out::HCA_VPORT_CONTEXT);
        for (field, value) in [
            (vport::PORT_PHYSICAL_STATE, physical),
            (vport::PORT_STATE, state),
            (vport::VPORT_STATE, state),
            (vport::SYSTEM_IMAGE_GUID, guid),
            (vport::PORT_GUID, guid),
            (vport::NODE_GUID, guid),
            (vport::LID, self.port.lid.0.into()),
            (vport::SM_LID, self.port.lid.0.into()),
        ] {
            prm::set(context, field, value);
        }
        Ok(Touched { kind: ObjectKind::Device, number: None })
    }
}

fn general(caps: &HcaCaps, out: &mut [u8]) {
    use prm::cmd_hca_cap as cap;
    let is_ib = caps.link == LinkLayer::Ib;
    for (field, value) in [
        (cap::HCA_CAP_2, 1),
        (cap::LOG_MAX_QP_SZ, caps.log_max_qp_sz.into()),
        (cap::LOG_MAX_CQ_SZ, caps.log_max_cq_sz.into()),
        (cap::LOG_MAX_QP, 16),
        (cap::LOG_MAX_CQ, 16),
        (cap::LOG_MAX_MKEY, 24),
        (cap::LOG_MAX_PD, 16),
        (cap::LOG_MAX_RA_REQ_QP, caps.log_max_rd_atomic.into()),
        (cap::LOG_MAX_RA_RES_QP, caps.log_max_rd_atomic.into()),
        (cap::GID_TABLE_SIZE, caps.gid_table_size.into()),
        (cap::PORT_TYPE, u64::from(!is_ib)),
        (cap::NUM_PORTS, 1),
        (cap::LOG_MAX_MSG, caps.log_max_msg.into()),
        (cap::CQE_VERSION, caps.cqe_version.into()),
        (cap::ROCE, u64::from(!is_ib)),
        (cap::ATOMIC, caps.atomic.into()),
        (cap::CQ_OI, 1),
        (cap::RC, 1),
        (cap::UAR_4K, 1),
        (cap::UMEM_UID_0, 1),
        (cap::BF, 1),
        (cap::LOG_BF_REG_SIZE, 9),
        (cap::MAX_WQE_SZ_SQ, caps.max_wqe_sz_sq.into()),
        (cap::MAX_WQE_SZ_RQ, caps.max_wqe_sz_rq.into()),
    ] {
        prm::set(out, field, value);
    }
}

/// Operations: compare-and-swap, fetch-and-add, and both with masks; words of 4 and 8 bytes.
fn atomic(out: &mut [u8]) {
    prm::set(out, prm::atomic_caps::ATOMIC_OPERATIONS, 0b1111);
    prm::set(out, prm::atomic_caps::ATOMIC_SIZE_QP, 4 | 8);
    // Host byte order is offered and in force.
    prm::set(out, prm::atomic_caps::ATOMIC_REQ_8B_ENDIANNESS_MODE, 1);
}

fn roce(caps: &HcaCaps, out: &mut [u8]) {
    if caps.link == LinkLayer::Roce {
        prm::set(out, prm::roce_cap::ROCE_VERSION, 0b100);
        prm::set(out, prm::roce_cap::ROCE_ADDRESS_TABLE_SIZE, caps.gid_table_size.into());
        prm::set(out, prm::roce_cap::R_ROCE_DEST_UDP_PORT, 4791);
        prm::set(out, prm::roce_cap::R_ROCE_MIN_SRC_UDP_PORT, 0xc000);
        prm::set(out, prm::roce_cap::R_ROCE_MAX_SRC_UDP_PORT, 0xffff);
    }
}
