//! Protection domains, doorbell pages, memory for objects and memory keys.
//!
//! `mkc.len` is called [`mkc::REGION_LEN`] here, because `LEN` is the size of every layout.

use super::{Layout, layouts};

layouts! {
    /// Allocates a protection domain.
    alloc_pd_in, 16 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
    }

    /// The protection domain.
    alloc_pd_out, 16 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        PD @ 0x48 : 24,
    }

    /// Frees a protection domain.
    dealloc_pd_in, 16 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
        PD @ 0x48 : 24,
    }

    /// Allocates a user access region.
    alloc_uar_in, 16 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
    }

    /// The user access region.
    alloc_uar_out, 16 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        UAR @ 0x48 : 24,
    }

    /// Frees a user access region.
    dealloc_uar_in, 16 {
        OPCODE @ 0x0 : 16,
        OP_MOD @ 0x30 : 16,
        UAR @ 0x48 : 24,
    }

    /// Registers memory for HCA objects; one [`mtt`](super::mtt) per page follows.
    create_umem_in, 48 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
        UMEM @ 0x80 : 256,
    }

    /// Memory for HCA objects: page size, offset into the first page, number of pages.
    umem, 32 {
        ATS @ 0x80 : 1,
        LOG_PAGE_SIZE @ 0x9b : 5,
        PAGE_OFFSET @ 0xa0 : 32,
        NUM_OF_MTT @ 0xc0 : 64,
        MTT @ 0x100 : 64,
    }

    /// The registered memory.
    create_umem_out, 16 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        UMEM_ID @ 0x48 : 24,
    }

    /// Deregisters memory for HCA objects.
    destroy_umem_in, 16 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
        UMEM_ID @ 0x48 : 24,
    }

    /// Translation of one page: its address and rights.
    mtt, 8 {
        PTAG_63_32 @ 0x0 : 32,
        PTAG_31_8 @ 0x20 : 24,
        WR_EN @ 0x3e : 1,
        RD_EN @ 0x3f : 1,
    }

    /// Creates a memory key; a translation per page follows.
    create_mkey_in, 272 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
        PG_ACCESS @ 0x60 : 1,
        MKEY_UMEM_VALID @ 0x61 : 1,
        MEMORY_KEY_MKEY_ENTRY @ 0x80 : 512,
        TRANSLATIONS_OCTWORD_ACTUAL_SIZE @ 0x300 : 32,
        KLM_PAS_MTT @ 0x880 : 32,
    }

    /// Memory key context.
    mkc, 64 {
        FREE @ 0x1 : 1,
        ACCESS_MODE_4_2 @ 0x3 : 3,
        RELAXED_ORDERING_WRITE @ 0xd : 1,
        SMALL_FENCE_ON_RDMA_READ_RESPONSE @ 0xf : 1,
        UMR_EN @ 0x10 : 1,
        A @ 0x11 : 1,
        RW @ 0x12 : 1,
        RR @ 0x13 : 1,
        LW @ 0x14 : 1,
        LR @ 0x15 : 1,
        ACCESS_MODE_1_0 @ 0x16 : 2,
        MA_TRANSLATION_MODE @ 0x1a : 2,
        QPN @ 0x20 : 24,
        MKEY_7_0 @ 0x38 : 8,
        LENGTH64 @ 0x60 : 1,
        BSF_EN @ 0x61 : 1,
        SYNC_UMR @ 0x62 : 1,
        EXPECTED_SIGERR_COUNT @ 0x65 : 1,
        EN_RINVAL @ 0x67 : 1,
        PD @ 0x68 : 24,
        START_ADDR @ 0x80 : 64,
        REGION_LEN @ 0xc0 : 64,
        BSF_OCTWORD_SIZE @ 0x100 : 32,
        TRANSLATIONS_OCTWORD_SIZE @ 0x1a0 : 32,
        RELAXED_ORDERING_READ @ 0x1d9 : 1,
        LOG_PAGE_SIZE @ 0x1db : 5,
        CRYPTO_EN @ 0x1e3 : 2,
    }

    /// The memory key.
    create_mkey_out, 16 {
        STATUS @ 0x0 : 8,
        SYNDROME @ 0x20 : 32,
        MKEY_INDEX @ 0x48 : 24,
    }

    /// Destroys a memory key.
    destroy_mkey_in, 16 {
        OPCODE @ 0x0 : 16,
        UID @ 0x10 : 16,
        OP_MOD @ 0x30 : 16,
        MKEY_INDEX @ 0x48 : 24,
    }
}
