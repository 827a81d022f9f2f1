//! Structures that libibverbs and libmlx5 exchange with the kernel, in the byte order of the host.
//!
//! Only what is used has a name. SPEC: ib_user_verbs.h, ib_user_ioctl_verbs.h, mlx5-abi.h; sizes are asserted below.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! exchanged {
    ($($(#[$doc:meta])* $name:ident, $len:literal { $($field:ident: $kind:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub(super) struct $name {
                $(pub(super) $field: $kind,)*
            }

            const _: () = assert!(size_of::<$name>() == $len);
        )*
    };
}

exchanged! {
    /// `ib_uverbs_query_device_resp`.
    DeviceAttr, 176 {
        fw_ver: u64,
        node_guid: [u8; 8],
        sys_image_guid: [u8; 8],
        max_mr_size: u64,
        page_size_cap: u64,
        vendor_id: u32,
        vendor_part_id: u32,
        hw_ver: u32,
        max_qp: u32,
        max_qp_wr: u32,
        device_cap_flags: u32,
        max_sge: u32,
        max_sge_rd: u32,
        max_cq: u32,
        max_cqe: u32,
        max_mr: u32,
        max_pd: u32,
        max_qp_rd_atom: u32,
        max_ee_rd_atom: u32,
        max_res_rd_atom: u32,
        max_qp_init_rd_atom: u32,
        max_ee_init_rd_atom: u32,
        atomic_cap: u32,
        max_ee_to_map_per_fmr: [u32; 11],
        max_srq: u32,
        max_srq_wr: u32,
        max_srq_sge: u32,
        max_pkeys: u16,
        local_ca_ack_delay: u8,
        phys_port_cnt: u8,
        reserved: [u8; 4],
    }

    /// `ib_uverbs_ex_query_device_resp`: what follows the base is zero but for its own length and the clock.
    DeviceAttrEx, 304 {
        base: DeviceAttr,
        comp_mask: u32,
        response_length: u32,
        odp_caps: [u32; 6],
        timestamp_mask: u64,
        hca_core_clock: u64,
        device_cap_flags_ex: u64,
        rest: [u32; 18],
    }

    /// `ib_uverbs_query_port_resp_ex`.
    PortAttr, 48 {
        port_cap_flags: u32,
        max_msg_sz: u32,
        bad_pkey_cntr: u32,
        qkey_viol_cntr: u32,
        gid_tbl_len: u32,
        pkey_tbl_len: u16,
        lid: u16,
        sm_lid: u16,
        state: u8,
        max_mtu: u8,
        active_mtu: u8,
        lmc: u8,
        max_vl_num: u8,
        sm_sl: u8,
        subnet_timeout: u8,
        init_type_reply: u8,
        active_width: u8,
        active_speed: u8,
        phys_state: u8,
        link_layer: u8,
        flags: u8,
        reserved: u8,
        port_cap_flags2: u16,
        reserved2: [u8; 6],
    }

    /// `ib_uverbs_gid_entry`.
    GidEntry, 32 {
        gid: [u8; 16],
        gid_index: u32,
        port_num: u32,
        gid_type: u32,
        netdev_ifindex: u32,
    }

    /// `mlx5_ib_alloc_ucontext_resp`.
    ContextAnswer, 72 {
        qp_tab_size: u32,
        bf_reg_size: u32,
        tot_bfregs: u32,
        cache_line_size: u32,
        max_sq_desc_sz: u16,
        max_rq_desc_sz: u16,
        max_send_wqebb: u32,
        max_recv_wr: u32,
        max_srq_recv_wr: u32,
        num_ports: u16,
        flow_action_flags: u16,
        comp_mask: u32,
        response_length: u32,
        cqe_version: u8,
        cmds_supp_uhw: u8,
        eth_min_inline: u8,
        clock_info_versions: u8,
        hca_core_clock_offset: u64,
        log_uar_size: u32,
        num_uars_per_page: u32,
        num_dyn_bfregs: u32,
        dump_fill_mkey: u32,
    }

    /// `mlx5_ib_query_device_resp`: only its own length.
    DriverDeviceAttr, 104 {
        comp_mask: u32,
        response_length: u32,
        caps: [u32; 24],
    }

    /// `ib_uverbs_reg_mr`.
    RegMr, 40 {
        response: u64,
        start: u64,
        length: u64,
        hca_va: u64,
        pd_handle: u32,
        access_flags: u32,
    }

    /// `ib_uverbs_reg_mr_resp`.
    RegMrAnswer, 12 {
        mr_handle: u32,
        lkey: u32,
        rkey: u32,
    }

    /// `ib_uverbs_create_ah`.
    CreateAh, 56 {
        response: u64,
        user_handle: u64,
        pd_handle: u32,
        reserved: u32,
        dgid: [u8; 16],
        flow_label: u32,
        grh_rest: [u8; 4],
        dlid: u16,
        sl: u8,
        src_path_bits: u8,
        static_rate: u8,
        is_global: u8,
        port_num: u8,
        reserved1: u8,
    }

    /// `mlx5_ib_create_ah_resp`.
    CreateAhAnswer, 16 {
        response_length: u32,
        dmac: [u8; 6],
        reserved: [u8; 6],
    }

    /// `mlx5_ib_create_cq`.
    CreateCq, 32 {
        buf_addr: u64,
        db_addr: u64,
        cqe_size: u32,
        cqe_comp_en: u8,
        cqe_comp_res_format: u8,
        flags: u16,
        uar_page_index: u16,
        reserved0: u16,
        reserved1: u32,
    }

    /// `ib_uverbs_qp_cap`.
    QpCap, 20 {
        max_send_wr: u32,
        max_recv_wr: u32,
        max_send_sge: u32,
        max_recv_sge: u32,
        max_inline_data: u32,
    }

    /// `mlx5_ib_create_qp`.
    CreateQp, 56 {
        buf_addr: u64,
        db_addr: u64,
        sq_wqe_count: u32,
        rq_wqe_count: u32,
        rq_wqe_shift: u32,
        flags: u32,
        uidx: u32,
        bfreg_index: u32,
        sq_buf_addr: u64,
        ece_options: u32,
        dci_streams: u16,
        reserved: u16,
    }

    /// `mlx5_ib_create_qp_resp`: of a queue pair that is no raw one.
    CreateQpAnswer, 40 {
        bfreg_index: u32,
        rest: [u32; 9],
    }

    /// `ib_uverbs_qp_dest`.
    QpDest, 32 {
        dgid: [u8; 16],
        flow_label: u32,
        dlid: u16,
        reserved: u16,
        sgid_index: u8,
        hop_limit: u8,
        traffic_class: u8,
        sl: u8,
        src_path_bits: u8,
        static_rate: u8,
        is_global: u8,
        port_num: u8,
    }

    /// `ib_uverbs_modify_qp`.
    ModifyQp, 112 {
        dest: QpDest,
        alt_dest: QpDest,
        qp_handle: u32,
        attr_mask: u32,
        qkey: u32,
        rq_psn: u32,
        sq_psn: u32,
        dest_qp_num: u32,
        qp_access_flags: u32,
        pkey_index: u16,
        alt_pkey_index: u16,
        qp_state: u8,
        cur_qp_state: u8,
        path_mtu: u8,
        path_mig_state: u8,
        en_sqd_async_notify: u8,
        max_rd_atomic: u8,
        max_dest_rd_atomic: u8,
        min_rnr_timer: u8,
        port_num: u8,
        timeout: u8,
        retry_cnt: u8,
        rnr_retry: u8,
        alt_port_num: u8,
        alt_timeout: u8,
        reserved: [u8; 2],
    }

    /// `ib_uverbs_query_qp`.
    QueryQp, 16 {
        response: u64,
        qp_handle: u32,
        attr_mask: u32,
    }

    /// `ib_uverbs_query_qp_resp`.
    QpAttr, 128 {
        dest: QpDest,
        alt_dest: QpDest,
        max_send_wr: u32,
        max_recv_wr: u32,
        max_send_sge: u32,
        max_recv_sge: u32,
        max_inline_data: u32,
        qkey: u32,
        rq_psn: u32,
        sq_psn: u32,
        dest_qp_num: u32,
        qp_access_flags: u32,
        pkey_index: u16,
        alt_pkey_index: u16,
        qp_state: u8,
        cur_qp_state: u8,
        path_mtu: u8,
        path_mig_state: u8,
        sq_draining: u8,
        max_rd_atomic: u8,
        max_dest_rd_atomic: u8,
        min_rnr_timer: u8,
        port_num: u8,
        timeout: u8,
        retry_cnt: u8,
        rnr_retry: u8,
        alt_port_num: u8,
        alt_timeout: u8,
        sq_sig_all: u8,
        reserved: [u8; 5],
    }

    /// `ib_uverbs_destroy_cq_resp`.
    DestroyCqAnswer, 8 {
        comp_events_reported: u32,
        async_events_reported: u32,
    }
}
