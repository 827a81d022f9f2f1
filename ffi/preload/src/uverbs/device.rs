//! Methods of the device itself: opening a context, and what device and port say of themselves.

use ibex_hca::{HcaCaps, LinkLayer, PortInfo};
use zerocopy::IntoBytes;

use super::abi::{ContextAnswer, DeviceAttr, DeviceAttrEx, DriverDeviceAttr, GidEntry, PortAttr};
use super::attrs::{Call, UHW_OUT};
use super::{Context, Done};
use crate::errno::Errno;
use crate::world::{Device, FIRMWARE_CODE};

/// Methods. SPEC: `enum uverbs_methods_device`.
mod method {
    pub(super) const INVOKE_WRITE: u16 = 0;
    pub(super) const QUERY_PORT: u16 = 2;
    pub(super) const GET_CONTEXT: u16 = 3;
    pub(super) const QUERY_CONTEXT: u16 = 4;
    pub(super) const QUERY_GID_TABLE: u16 = 5;
    pub(super) const QUERY_GID_ENTRY: u16 = 6;
}

/// Interrupt vectors, as the kernel driver would spread them over processors.
pub(super) const COMP_VECTORS: u32 = 4;
/// Log2 of the number of objects of most kinds, as the device's capabilities say.
const LOG_OBJECTS: u32 = 16;
/// ConnectX-7.
const VENDOR: (u32, u32) = (0x2c9, 0x1021);
/// Segments of 16 bytes in the longest send WQE, less those for control and remote address.
const MAX_SGE: u32 = 30;
/// Atomics are atomic among queue pairs of this device only. SPEC: `IBV_ATOMIC_HCA`.
const ATOMIC_HCA: u32 = 1;
/// libmlx5 may send, and be sent, driver data with QUERY_DEVICE and CREATE_AH. SPEC: `enum mlx5_user_cmds_supp_uhw`.
const UHW_COMMANDS: u8 = 0b11;
/// Bytes of a doorbell register with its twin.
const BF_REG_SIZE: u32 = 512;
/// The clock that stamps completions counts nanoseconds.
const CLOCK_KHZ: u64 = 1_000_000;

impl Context {
    pub(super) fn device_method(&self, call: &Call) -> Done {
        match call.method {
            method::INVOKE_WRITE => self.invoke_write(call),
            method::QUERY_PORT => self.query_port(call),
            method::GET_CONTEXT | method::QUERY_CONTEXT => self.get_context(call),
            method::QUERY_GID_TABLE => self.query_gid_table(call),
            method::QUERY_GID_ENTRY => self.query_gid_entry(call),
            _ => Err(Errno::NO_METHOD),
        }
    }

    fn get_context(&self, call: &Call) -> Done {
        const NUM_COMP_VECTORS: u16 = 0;
        const CORE_SUPPORT: u16 = 1;
        call.set_output(NUM_COMP_VECTORS, COMP_VECTORS.as_bytes())?;
        call.set_output(CORE_SUPPORT, 0_u64.as_bytes())?;
        call.set_output(UHW_OUT, context_answer(self.hca().caps()).as_bytes())
    }

    fn query_port(&self, call: &Call) -> Done {
        const PORT_NUM: u16 = 0;
        const RESP: u16 = 1;
        let port = self.device.port();
        if call.number(PORT_NUM)? != u64::from(port.port_num) {
            return Err(Errno::INVAL);
        }
        let is_up = self.device.hca().is_port_up();
        call.set_output(RESP, port_attr(&port, is_up, self.hca().caps()).as_bytes())
    }

    fn query_gid_table(&self, call: &Call) -> Done {
        const ENTRY_SIZE: u16 = 0;
        const RESP_ENTRIES: u16 = 2;
        const RESP_NUM_ENTRIES: u16 = 3;
        let size = call.number(ENTRY_SIZE)?;
        if size < size_of::<GidEntry>() as u64 || (call.room(RESP_ENTRIES) as u64) < size {
            return Err(Errno::INVAL);
        }
        call.set_output(RESP_ENTRIES, gid_entry(&self.device.port()).as_bytes())?;
        call.set_output(RESP_NUM_ENTRIES, 1_u64.as_bytes())
    }

    fn query_gid_entry(&self, call: &Call) -> Done {
        const PORT: u16 = 0;
        const GID_INDEX: u16 = 1;
        const RESP_ENTRY: u16 = 3;
        let port = self.device.port();
        if call.number(PORT)? != u64::from(port.port_num) {
            return Err(Errno::INVAL);
        }
        if call.number(GID_INDEX)? != u64::from(port.gid_index) {
            return Err(Errno(libc::ENODATA));
        }
        call.set_output(RESP_ENTRY, gid_entry(&port).as_bytes())
    }
}

/// What a new context has: doorbell pages on demand, each with its own allocation.
fn context_answer(caps: &HcaCaps) -> ContextAnswer {
    ContextAnswer {
        qp_tab_size: 1 << LOG_OBJECTS,
        bf_reg_size: BF_REG_SIZE,
        tot_bfregs: 0,
        cache_line_size: 64,
        max_sq_desc_sz: caps.max_wqe_sz_sq,
        max_rq_desc_sz: caps.max_wqe_sz_rq,
        max_send_wqebb: 1 << caps.log_max_qp_sz,
        max_recv_wr: 1 << caps.log_max_qp_sz,
        // So that the refusal of a shared receive queue is ours and not the library's.
        max_srq_recv_wr: 1 << caps.log_max_qp_sz,
        num_ports: 1,
        flow_action_flags: 0,
        comp_mask: 0,
        response_length: size_of::<ContextAnswer>() as u32, // CAST: 72.
        cqe_version: caps.cqe_version,
        cmds_supp_uhw: UHW_COMMANDS,
        eth_min_inline: 0,
        clock_info_versions: 0,
        hca_core_clock_offset: 0,
        log_uar_size: 12,
        num_uars_per_page: 1,
        num_dyn_bfregs: 0,
        dump_fill_mkey: 0,
    }
}

pub(super) fn device_attr(device: &Device, caps: &HcaCaps) -> DeviceAttr {
    let reads = 1 << caps.log_max_rd_atomic;
    DeviceAttr {
        fw_ver: FIRMWARE_CODE,
        node_guid: device.guid().to_be_bytes(),
        sys_image_guid: device.guid().to_be_bytes(),
        max_mr_size: i64::MAX.cast_unsigned(),
        page_size_cap: 0xffff_f000,
        vendor_id: VENDOR.0,
        vendor_part_id: VENDOR.1,
        hw_ver: 0,
        max_qp: 1 << LOG_OBJECTS,
        max_qp_wr: 1 << caps.log_max_qp_sz,
        device_cap_flags: 0,
        max_sge: MAX_SGE,
        max_sge_rd: MAX_SGE,
        max_cq: 1 << LOG_OBJECTS,
        max_cqe: (1 << caps.log_max_cq_sz) - 1,
        max_mr: 1 << LOG_OBJECTS,
        max_pd: 1 << LOG_OBJECTS,
        max_qp_rd_atom: reads,
        max_ee_rd_atom: 0,
        max_res_rd_atom: reads << LOG_OBJECTS,
        max_qp_init_rd_atom: reads,
        max_ee_init_rd_atom: 0,
        atomic_cap: if caps.atomic { ATOMIC_HCA } else { 0 },
        max_ee_to_map_per_fmr: [0; 11],
        max_srq: 0,
        max_srq_wr: 0,
        max_srq_sge: 0,
        max_pkeys: 1,
        local_ca_ack_delay: 0,
        phys_port_cnt: 1,
        reserved: [0; 4],
    }
}

pub(super) fn device_attr_ex(device: &Device, caps: &HcaCaps) -> DeviceAttrEx {
    DeviceAttrEx {
        base: device_attr(device, caps),
        comp_mask: 0,
        response_length: size_of::<DeviceAttrEx>() as u32, // CAST: 304.
        odp_caps: [0; 6],
        timestamp_mask: u64::MAX,
        hca_core_clock: CLOCK_KHZ,
        device_cap_flags_ex: 0,
        rest: [0; 18],
    }
}

/// What libmlx5 is told beside it: nothing of what it asks for is offered.
pub(super) fn driver_device_attr() -> DriverDeviceAttr {
    let response_length = size_of::<DriverDeviceAttr>() as u32; // CAST: 104.
    DriverDeviceAttr { comp_mask: 0, response_length, caps: [0; 24] }
}

fn port_attr(port: &PortInfo, is_up: bool, caps: &HcaCaps) -> PortAttr {
    const DOWN: u8 = 1;
    const POLLING: u8 = 2;
    const ACTIVE: u8 = 4;
    const LINK_UP: u8 = 5;
    const WIDTH_4X: u8 = 2;
    const SPEED_NDR: u8 = 128;
    const IP_BASED_GIDS: u32 = 1 << 26;
    let (link_layer, port_cap_flags) = match port.link {
        LinkLayer::Ib => (1, 0),
        LinkLayer::Roce => (2, IP_BASED_GIDS),
    };
    PortAttr {
        port_cap_flags,
        max_msg_sz: 1 << caps.log_max_msg,
        bad_pkey_cntr: 0,
        qkey_viol_cntr: 0,
        gid_tbl_len: caps.gid_table_size.into(),
        pkey_tbl_len: 1,
        lid: port.lid.0,
        sm_lid: port.lid.0,
        state: if is_up { ACTIVE } else { DOWN },
        max_mtu: port.mtu.code(),
        active_mtu: port.mtu.code(),
        lmc: 0,
        max_vl_num: 1,
        sm_sl: 0,
        subnet_timeout: 0,
        init_type_reply: 0,
        active_width: WIDTH_4X,
        active_speed: SPEED_NDR,
        phys_state: if is_up { LINK_UP } else { POLLING },
        link_layer,
        flags: 0,
        reserved: 0,
        port_cap_flags2: 0,
        reserved2: [0; 6],
    }
}

fn gid_entry(port: &PortInfo) -> GidEntry {
    let gid_type = match port.link {
        LinkLayer::Ib => 0,
        LinkLayer::Roce => 2,
    };
    let (gid_index, port_num) = (port.gid_index.into(), port.port_num.into());
    GidEntry { gid: port.gid.0, gid_index, port_num, gid_type, netdev_ifindex: 0 }
}
