//! Completion and event queues.
//!
//! Sources disagree on `eqc.intr`: Linux 6.1 has 12 bits at 0xb4, DOCA, NVSHMEM and rdma-core have 8
//! bits at 0xb8. Both name the same number below 256; we use the narrower.

use super::{Layout, layouts};

layouts! {
    /// Creates a completion queue.
    create_cq_in, 272 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
        CQ_CONTEXT @ 0x80 : 512,
        CQ_UMEM_OFFSET @ 0x280 : 64,
        CQ_UMEM_ID @ 0x2c0 : 32,
        CQ_UMEM_VALID @ 0x2e0 : 1,
        PAS @ 0x880 : 64,
    }

    /// Completion queue context.
    cqc, 64 {
        STATUS @ 0x0 : 4,
        AS_NOTIFY @ 0x4 : 1,
        INITIATOR_SRC_DCT @ 0x5 : 1,
        DBR_UMEM_VALID @ 0x6 : 1,
        APU_CQ @ 0x7 : 1,
        CQE_SZ @ 0x8 : 3,
        CC @ 0xb : 1,
        SCQE_BREAK_MODERATION_EN @ 0xd : 1,
        OI @ 0xe : 1,
        CQ_PERIOD_MODE @ 0xf : 2,
        CQE_COMP_EN @ 0x11 : 1,
        MINI_CQE_RES_FORMAT @ 0x12 : 2,
        ST @ 0x14 : 4,
        CQE_COMP_LAYOUT @ 0x19 : 7,
        CQE_COMPRESSION_LAYOUT @ 0x1e : 2,
        DBR_UMEM_ID @ 0x20 : 32,
        PAGE_OFFSET @ 0x54 : 6,
        MINI_CQE_RES_FORMAT_EXT @ 0x5c : 2,
        CQ_TIMESTAMP_FORMAT @ 0x5e : 2,
        LOG_CQ_SIZE @ 0x63 : 5,
        UAR_PAGE @ 0x68 : 24,
        CQ_PERIOD @ 0x84 : 12,
        CQ_MAX_COUNT @ 0x90 : 16,
        C_EQN_OR_APU_ELEMENT @ 0xa0 : 32,
        C_EQN @ 0xb8 : 8,
        LOG_PAGE_SIZE @ 0xc3 : 5,
        LAST_NOTIFIED_INDEX @ 0x108 : 24,
        LAST_SOLICIT_INDEX @ 0x128 : 24,
        CONSUMER_COUNTER @ 0x148 : 24,
        PRODUCER_COUNTER @ 0x168 : 24,
        LOCAL_PARTITION_ID @ 0x180 : 12,
        PROCESS_ID @ 0x18c : 20,
        DBR_ADDR @ 0x1c0 : 64,
    }

    /// The completion queue.
    create_cq_out, 16 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        CQN @ 0x48 : 24,
    }

    /// Destroys a completion queue.
    destroy_cq_in, 16 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
        CQN @ 0x48 : 24,
    }

    /// Creates an event queue.
    create_eq_in, 272 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
        EQ_CONTEXT_ENTRY @ 0x80 : 512,
        EVENT_BITMASK @ 0x2c0 : 64,
        PAS @ 0x880 : 64,
    }

    /// Event queue context.
    eqc, 64 {
        STATUS @ 0x0 : 4,
        EC @ 0xd : 1,
        OI @ 0xe : 1,
        ST @ 0x14 : 4,
        PAGE_OFFSET @ 0x54 : 6,
        LOG_EQ_SIZE @ 0x63 : 5,
        UAR_PAGE @ 0x68 : 24,
        INTR @ 0xb8 : 8,
        LOG_PAGE_SIZE @ 0xc3 : 5,
        CONSUMER_COUNTER @ 0x148 : 24,
        PRODUCER_COUNTER @ 0x168 : 24,
    }

    /// The event queue.
    create_eq_out, 16 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        EQ_NUMBER @ 0x58 : 8,
    }

    /// Reads an event queue's state.
    query_eq_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        EQ_NUMBER @ 0x58 : 8,
    }

    /// The event queue's context.
    query_eq_out, 272 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        EQ_CONTEXT_ENTRY @ 0x80 : 512,
        EVENT_BITMASK @ 0x2c0 : 64,
        PAS @ 0x880 : 64,
    }

    /// Destroys an event queue.
    destroy_eq_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        EQ_NUMBER @ 0x58 : 8,
    }
}
