//! Capabilities, bring-up, ports and addresses.

use super::{Layout, layouts};

layouts! {
    /// What every command begins with.
    cmd_in, 16 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
    }

    /// What every reply begins with; all of it where a command has nothing to say.
    cmd_out, 16 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
    }

    /// Asks for one group of capabilities: `op_mod` is `group << 1 | current`.
    query_hca_cap_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        OTHER_FUNCTION @ 0x40 : 1,
        FUNCTION_ID @ 0x50 : 16,
    }

    /// One group of capabilities; callers may ask for fewer bytes.
    query_hca_cap_out, 4112 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        CAPABILITY @ 0x80 : 32768,
    }

    /// General capabilities (group 0).
    cmd_hca_cap, 256 {
        HCA_CAP_2 @ 0x20 : 1,
        VHCA_ID @ 0x30 : 16,
        QP_DATA_IN_ORDER @ 0x62 : 1,
        LOG_MAX_QP_SZ @ 0x88 : 8,
        LOG_MAX_QP @ 0x9b : 5,
        LOG_MAX_CQ_SZ @ 0xc8 : 8,
        LOG_MAX_CQ @ 0xdb : 5,
        LOG_MAX_EQ_SZ @ 0xe0 : 8,
        RELAXED_ORDERING_WRITE @ 0xe8 : 1,
        LOG_MAX_MKEY @ 0xea : 6,
        LOG_MAX_EQ @ 0xfc : 4,
        LOG_MAX_MRW_SZ @ 0x109 : 7,
        LOG_MAX_RA_REQ_QP @ 0x14a : 6,
        LOG_MAX_RA_RES_QP @ 0x15a : 6,
        RTS2RTS_QP_DSCP @ 0x16a : 1,
        GID_TABLE_SIZE @ 0x170 : 16,
        LOCAL_CA_ACK_DELAY @ 0x1ab : 5,
        PORT_TYPE @ 0x1b6 : 2,
        NUM_PORTS @ 0x1b8 : 8,
        LOG_MAX_MSG @ 0x1c3 : 5,
        CQE_VERSION @ 0x1fc : 4,
        COMPACT_ADDRESS_VECTOR @ 0x200 : 1,
        WQ_SIGNATURE @ 0x214 : 1,
        SCTR_DATA_CQE @ 0x215 : 1,
        ROCE @ 0x21d : 1,
        ATOMIC @ 0x21e : 1,
        CQ_OI @ 0x220 : 1,
        PG @ 0x227 : 1,
        RC @ 0x23f : 1,
        UAR_4K @ 0x240 : 1,
        UAR_SZ @ 0x24a : 6,
        UMEM_UID_0 @ 0x252 : 1,
        LOG_PG_SZ @ 0x258 : 8,
        BF @ 0x260 : 1,
        MKEY_BY_NAME @ 0x266 : 1,
        LOG_BF_REG_SIZE @ 0x26b : 5,
        MAX_WQE_SZ_SQ @ 0x290 : 16,
        MAX_WQE_SZ_RQ @ 0x2b0 : 16,
        LOG_MAX_PD @ 0x32b : 5,
        LOG_MAX_WQ_SZ @ 0x3db : 5,
        SQ_TS_FORMAT @ 0x440 : 2,
        LOG_UAR_PAGE_SZ @ 0x490 : 16,
        DEVICE_FREQUENCY_KHZ @ 0x4e0 : 32,
        LOG_MAX_ATOMIC_SIZE_QP @ 0x580 : 8,
    }

    /// More general capabilities (group 0x20).
    cmd_hca_cap_2, 256 {
        SEND_DBR_MODE_NO_DBR_EXT @ 0x2e1 : 1,
    }

    /// Capabilities of atomics (group 3).
    atomic_caps, 256 {
        ATOMIC_REQ_8B_ENDIANNESS_MODE @ 0x40 : 2,
        ATOMIC_OPERATIONS @ 0x90 : 16,
        ATOMIC_SIZE_QP @ 0xb0 : 16,
        ATOMIC_SIZE_DC @ 0xd0 : 16,
        FETCH_ADD_PCI_ATOMIC @ 0x280 : 16,
        SWAP_PCI_ATOMIC @ 0x290 : 16,
        COMPARE_SWAP_PCI_ATOMIC @ 0x2a0 : 16,
    }

    /// Capabilities of RoCE (group 4).
    roce_cap, 256 {
        SW_R_ROCE_SRC_UDP_PORT @ 0x4 : 1,
        QP_TS_FORMAT @ 0x1e : 2,
        L3_TYPE @ 0x8c : 4,
        ROCE_VERSION @ 0x98 : 8,
        R_ROCE_DEST_UDP_PORT @ 0xb0 : 16,
        R_ROCE_MAX_SRC_UDP_PORT @ 0xc0 : 16,
        R_ROCE_MIN_SRC_UDP_PORT @ 0xd0 : 16,
        ROCE_ADDRESS_TABLE_SIZE @ 0xf0 : 16,
    }

    /// Sets one group of capabilities.
    set_hca_cap_in, 4112 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        OTHER_FUNCTION @ 0x40 : 1,
        FUNCTION_ID @ 0x50 : 16,
        CAPABILITY @ 0x80 : 32768,
    }

    /// Wakes the device: the first command of all.
    enable_hca_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        EMBEDDED_CPU_FUNCTION @ 0x40 : 1,
        FUNCTION_ID @ 0x50 : 16,
    }

    /// Reply to the first command.
    enable_hca_out, 12 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
    }

    /// Asks which interface revisions there are.
    query_issi_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
    }

    /// Which interface revisions there are.
    query_issi_out, 112 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        CURRENT_ISSI @ 0x50 : 16,
        SUPPORTED_ISSI_DW0 @ 0x360 : 32,
    }

    /// Chooses an interface revision.
    set_issi_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        CURRENT_ISSI @ 0x50 : 16,
    }

    /// Asks how many pages the device wants.
    query_pages_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        EMBEDDED_CPU_FUNCTION @ 0x40 : 1,
        FUNCTION_ID @ 0x50 : 16,
    }

    /// How many pages the device wants.
    query_pages_out, 16 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        EMBEDDED_CPU_FUNCTION @ 0x40 : 1,
        FUNCTION_ID @ 0x50 : 16,
        NUM_PAGES @ 0x60 : 32,
    }

    /// Gives pages to the device, or takes them; their addresses follow.
    manage_pages_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        EMBEDDED_CPU_FUNCTION @ 0x40 : 1,
        FUNCTION_ID @ 0x50 : 16,
        INPUT_NUM_ENTRIES @ 0x60 : 32,
        PAS @ 0x80 : 64,
    }

    /// Starts the device.
    init_hca_in, 32 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        SW_VHCA_ID @ 0x62 : 14,
        SW_OWNER_ID @ 0x80 : 32,
    }

    /// Stops the device.
    teardown_hca_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        PROFILE @ 0x50 : 16,
    }

    /// Reads or writes a register.
    access_register_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        REGISTER_ID @ 0x50 : 16,
        ARGUMENT @ 0x60 : 32,
        REGISTER_DATA @ 0x80 : 32,
    }

    /// A register that was read.
    access_register_out, 16 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        REGISTER_DATA @ 0x80 : 32,
    }

    /// Register 0x5006: administrative and operational status of a port.
    paos_reg, 16 {
        SWID @ 0x0 : 8,
        LOCAL_PORT @ 0x8 : 8,
        ADMIN_STATUS @ 0x14 : 4,
        OPER_STATUS @ 0x1c : 4,
        ASE @ 0x20 : 1,
        EE @ 0x21 : 1,
        E @ 0x3e : 2,
    }

    /// Passes a management datagram to the device.
    mad_ifc_in, 272 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        REMOTE_LID @ 0x40 : 16,
        PORT @ 0x58 : 8,
        MAD @ 0x80 : 8,
    }

    /// The device's answer to a management datagram.
    mad_ifc_out, 272 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        RESPONSE_MAD_PACKET @ 0x80 : 8,
    }

    /// A management datagram. SPEC: IBTA vol. 1 §13.4.2.
    mad, 256 {
        BASE_VERSION @ 0x0 : 8,
        MGMT_CLASS @ 0x8 : 8,
        CLASS_VERSION @ 0x10 : 8,
        METHOD @ 0x18 : 8,
        STATUS @ 0x20 : 16,
        TRANSACTION_ID @ 0x40 : 64,
        ATTRIBUTE_ID @ 0x80 : 16,
        ATTRIBUTE_MODIFIER @ 0xa0 : 32,
    }

    /// Asks for the state of an InfiniBand port.
    query_hca_vport_context_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        OTHER_VPORT @ 0x40 : 1,
        PORT_NUM @ 0x4c : 4,
        VPORT_NUMBER @ 0x50 : 16,
    }

    /// The state of an InfiniBand port.
    query_hca_vport_context_out, 528 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        HCA_VPORT_CONTEXT @ 0x80 : 4096,
    }

    /// State of an InfiniBand port.
    hca_vport_context, 512 {
        GRH_REQUIRED @ 0x103 : 1,
        PORT_PHYSICAL_STATE @ 0x110 : 4,
        VPORT_STATE_POLICY @ 0x114 : 4,
        PORT_STATE @ 0x118 : 4,
        VPORT_STATE @ 0x11c : 4,
        SYSTEM_IMAGE_GUID @ 0x140 : 64,
        PORT_GUID @ 0x180 : 64,
        NODE_GUID @ 0x1c0 : 64,
        CAP_MASK1 @ 0x200 : 32,
        LID @ 0x300 : 16,
        LMC @ 0x318 : 3,
        SUBNET_TIMEOUT @ 0x31b : 5,
        SM_LID @ 0x320 : 16,
        SM_SL @ 0x330 : 4,
    }

    /// Asks for one entry of the GID table.
    query_roce_address_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        ROCE_ADDRESS_INDEX @ 0x40 : 16,
        VHCA_PORT_NUM @ 0x5c : 4,
    }

    /// One entry of the GID table.
    query_roce_address_out, 48 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        ROCE_ADDRESS_NUM @ 0x60 : 16,
        ROCE_ADDRESS @ 0x80 : 256,
    }

    /// An entry of the GID table.
    roce_addr_layout, 32 {
        SOURCE_L3_ADDRESS @ 0x0 : 8,
        RX_ALLOW_UNTAGGED @ 0x82 : 1,
        VLAN_VALID @ 0x83 : 1,
        VLAN_ID @ 0x84 : 12,
        SOURCE_MAC_47_32 @ 0x90 : 16,
        SOURCE_MAC_31_0 @ 0xa0 : 32,
        ROCE_L3_TYPE @ 0xd4 : 4,
        ROCE_VERSION @ 0xd8 : 8,
    }
}
