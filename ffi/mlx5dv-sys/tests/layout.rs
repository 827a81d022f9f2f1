//! The C headers' structures and numbers, compared with what `ibex-abi` says about the same bytes.

use std::mem::{offset_of, size_of};

use ibex_abi::cqe::{CompletionWord, Cqe64, CqeOpcode, ErrorCqe, Syndrome, WcOpcode, WcStatus};
use ibex_abi::doorbell::DoorbellRecord;
use ibex_abi::types::{PathMtu, QpState};
use ibex_abi::wqe::{
    AtomicSeg, CqUpdate, CtrlFlags, CtrlSeg, DataSeg, FenceMode, INVALID_LKEY, InlineHeader, Opcode, RaddrSeg,
};
use ibex_mlx5dv_sys as sys;

/// Asserts that a C structure and ours have one size and that fields lie at the same offsets.
macro_rules! same_layout {
    ($c:ident, $ours:ident { $($($c_field:ident).+ = $our_field:ident),* $(,)? }) => {
        assert_eq!(size_of::<sys::$c>(), size_of::<$ours>(), stringify!($c));
        $(assert_eq!(
            offset_of!(sys::$c, $($c_field).+),
            offset_of!($ours, $our_field),
            concat!(stringify!($c), ".", stringify!($our_field)),
        );)*
    };
}

#[test]
fn wqe_segments_lie_as_in_the_headers() {
    same_layout!(mlx5_wqe_ctrl_seg, CtrlSeg {
        opmod_idx_opcode = opmod_idx_opcode,
        qpn_ds = qpn_ds,
        signature = signature,
        dci_stream_channel_id = dci_stream,
        fm_ce_se = fm_ce_se,
        imm = imm,
    });
    same_layout!(mlx5_wqe_raddr_seg, RaddrSeg { raddr = raddr, rkey = rkey, reserved = reserved });
    same_layout!(mlx5_wqe_data_seg, DataSeg { byte_count = byte_count, lkey = lkey, addr = addr });
    same_layout!(mlx5_wqe_inl_data_seg, InlineHeader { byte_count = byte_count });
    same_layout!(mlx5_wqe_atomic_seg, AtomicSeg { swap_add = swap_add, compare = compare });
}

#[test]
fn completions_lie_as_in_the_headers() {
    same_layout!(mlx5_cqe64, Cqe64 {
        __bindgen_anon_1.__bindgen_anon_1.wqe_id = wqe_id,
        __bindgen_anon_1.__bindgen_anon_1.ml_path = ml_path,
        __bindgen_anon_1.__bindgen_anon_1.slid = slid,
        __bindgen_anon_1.__bindgen_anon_1.flags_rqpn = flags_rqpn,
        __bindgen_anon_1.__bindgen_anon_1.hds_ip_ext = hds_ip_ext,
        __bindgen_anon_1.__bindgen_anon_1.l4_hdr_type_etc = l4_hdr_type_etc,
        __bindgen_anon_1.__bindgen_anon_1.vlan_info = vlan_info,
        srqn_uidx = srqn_uidx,
        imm_inval_pkey = imm_inval_pkey,
        app = app,
        app_op = app_op,
        app_info = app_info,
        byte_cnt = byte_cnt,
        timestamp = timestamp,
        sop_drop_qpn = sop_drop_qpn,
        wqe_counter = word,
    });
    same_layout!(mlx5_err_cqe, ErrorCqe {
        srqn = srqn_uidx,
        vendor_err_synd = vendor_err_synd,
        syndrome = syndrome,
        s_wqe_opcode_qpn = s_wqe_opcode_qpn,
        wqe_counter = word,
    });
    let in_word = |offset: usize| offset - offset_of!(Cqe64, word);
    let signature = offset_of!(sys::mlx5_cqe64, signature);
    let op_own = offset_of!(sys::mlx5_cqe64, op_own);
    assert_eq!(in_word(signature), offset_of!(CompletionWord, signature));
    assert_eq!(in_word(op_own), offset_of!(CompletionWord, op_own));
    assert_eq!(offset_of!(sys::mlx5_err_cqe, signature), signature);
    assert_eq!(offset_of!(sys::mlx5_err_cqe, op_own), op_own);
}

#[test]
fn doorbell_records_lie_as_in_the_headers() {
    // The headers give word indices.
    assert_eq!(offset_of!(DoorbellRecord, rcv), 4 * sys::MLX5_RCV_DBR as usize);
    assert_eq!(offset_of!(DoorbellRecord, snd), 4 * sys::MLX5_SND_DBR as usize);
}

#[test]
fn opcodes_and_flags_have_the_numbers_of_the_headers() {
    let opcodes = [
        (Opcode::Nop, sys::MLX5_OPCODE_NOP),
        (Opcode::SendInval, sys::MLX5_OPCODE_SEND_INVAL),
        (Opcode::RdmaWrite, sys::MLX5_OPCODE_RDMA_WRITE),
        (Opcode::RdmaWriteImm, sys::MLX5_OPCODE_RDMA_WRITE_IMM),
        (Opcode::Send, sys::MLX5_OPCODE_SEND),
        (Opcode::SendImm, sys::MLX5_OPCODE_SEND_IMM),
        (Opcode::Tso, sys::MLX5_OPCODE_TSO),
        (Opcode::RdmaRead, sys::MLX5_OPCODE_RDMA_READ),
        (Opcode::AtomicCs, sys::MLX5_OPCODE_ATOMIC_CS),
        (Opcode::AtomicFa, sys::MLX5_OPCODE_ATOMIC_FA),
        (Opcode::AtomicMaskedCs, sys::MLX5_OPCODE_ATOMIC_MASKED_CS),
        (Opcode::AtomicMaskedFa, sys::MLX5_OPCODE_ATOMIC_MASKED_FA),
        (Opcode::Fmr, sys::MLX5_OPCODE_FMR),
        (Opcode::LocalInval, sys::MLX5_OPCODE_LOCAL_INVAL),
        (Opcode::ConfigCmd, sys::MLX5_OPCODE_CONFIG_CMD),
        (Opcode::SetPsv, sys::MLX5_OPCODE_SET_PSV),
        (Opcode::Umr, sys::MLX5_OPCODE_UMR),
        (Opcode::TagMatching, sys::MLX5_OPCODE_TAG_MATCHING),
        (Opcode::FlowTableAccess, sys::MLX5_OPCODE_FLOW_TBL_ACCESS),
        (Opcode::Mmo, sys::MLX5_OPCODE_MMO),
    ];
    for (ours, theirs) in opcodes {
        assert_eq!(u32::from(ours.byte()), theirs, "{ours:?}");
    }
    // WAIT and DUMP are in no public header of rdma-core.
    assert_eq!(opcodes.len() + 2, Opcode::ALL.len());
    let flags = |fence, completion, solicited| u32::from(CtrlFlags::new(fence, completion, solicited).0);
    let none = FenceMode::None;
    assert_eq!(flags(none, CqUpdate::Always, false), sys::MLX5_WQE_CTRL_CQ_UPDATE);
    assert_eq!(flags(none, CqUpdate::OnError, true), sys::MLX5_WQE_CTRL_SOLICITED);
    let fence = flags(FenceMode::SmallAndFence, CqUpdate::OnError, false);
    assert_eq!(fence, sys::MLX5_WQE_CTRL_FENCE);
    let small = flags(FenceMode::InitiatorSmall, CqUpdate::OnError, false);
    assert_eq!(small, sys::MLX5_WQE_CTRL_INITIATOR_SMALL_FENCE);
    assert_eq!(InlineHeader::FLAG, sys::MLX5_INLINE_SEG);
    assert_eq!(INVALID_LKEY, sys::MLX5_INVALID_LKEY);
}

#[test]
fn completion_numbers_are_those_of_the_headers() {
    let opcodes = [
        (CqeOpcode::Req, sys::MLX5_CQE_REQ),
        (CqeOpcode::RespWriteImm, sys::MLX5_CQE_RESP_WR_IMM),
        (CqeOpcode::RespSend, sys::MLX5_CQE_RESP_SEND),
        (CqeOpcode::RespSendImm, sys::MLX5_CQE_RESP_SEND_IMM),
        (CqeOpcode::RespSendInval, sys::MLX5_CQE_RESP_SEND_INV),
        (CqeOpcode::Resize, sys::MLX5_CQE_RESIZE_CQ),
        (CqeOpcode::NoPacket, sys::MLX5_CQE_NO_PACKET),
        (CqeOpcode::SigErr, sys::MLX5_CQE_SIG_ERR),
        (CqeOpcode::ReqErr, sys::MLX5_CQE_REQ_ERR),
        (CqeOpcode::RespErr, sys::MLX5_CQE_RESP_ERR),
        (CqeOpcode::Invalid, sys::MLX5_CQE_INVALID),
    ];
    for (ours, theirs) in opcodes {
        assert_eq!(u32::from(ours.code()), theirs, "{ours:?}");
    }
    let syndromes = [
        (Syndrome::LOCAL_LENGTH, sys::MLX5_CQE_SYNDROME_LOCAL_LENGTH_ERR, sys::IBV_WC_LOC_LEN_ERR),
        (Syndrome::LOCAL_QP_OP, sys::MLX5_CQE_SYNDROME_LOCAL_QP_OP_ERR, sys::IBV_WC_LOC_QP_OP_ERR),
        (Syndrome::LOCAL_PROT, sys::MLX5_CQE_SYNDROME_LOCAL_PROT_ERR, sys::IBV_WC_LOC_PROT_ERR),
        (Syndrome::WR_FLUSH, sys::MLX5_CQE_SYNDROME_WR_FLUSH_ERR, sys::IBV_WC_WR_FLUSH_ERR),
        (Syndrome::MW_BIND, sys::MLX5_CQE_SYNDROME_MW_BIND_ERR, sys::IBV_WC_MW_BIND_ERR),
        (Syndrome::BAD_RESP, sys::MLX5_CQE_SYNDROME_BAD_RESP_ERR, sys::IBV_WC_BAD_RESP_ERR),
        (Syndrome::LOCAL_ACCESS, sys::MLX5_CQE_SYNDROME_LOCAL_ACCESS_ERR, sys::IBV_WC_LOC_ACCESS_ERR),
        (
            Syndrome::REMOTE_INVAL_REQ,
            sys::MLX5_CQE_SYNDROME_REMOTE_INVAL_REQ_ERR,
            sys::IBV_WC_REM_INV_REQ_ERR,
        ),
        (Syndrome::REMOTE_ACCESS, sys::MLX5_CQE_SYNDROME_REMOTE_ACCESS_ERR, sys::IBV_WC_REM_ACCESS_ERR),
        (Syndrome::REMOTE_OP, sys::MLX5_CQE_SYNDROME_REMOTE_OP_ERR, sys::IBV_WC_REM_OP_ERR),
        (
            Syndrome::TRANSPORT_RETRY_EXC,
            sys::MLX5_CQE_SYNDROME_TRANSPORT_RETRY_EXC_ERR,
            sys::IBV_WC_RETRY_EXC_ERR,
        ),
        (Syndrome::RNR_RETRY_EXC, sys::MLX5_CQE_SYNDROME_RNR_RETRY_EXC_ERR, sys::IBV_WC_RNR_RETRY_EXC_ERR),
        (Syndrome::REMOTE_ABORTED, sys::MLX5_CQE_SYNDROME_REMOTE_ABORTED_ERR, sys::IBV_WC_REM_ABORT_ERR),
    ];
    assert_eq!(syndromes.map(|(ours, ..)| ours), Syndrome::ALL);
    for (ours, syndrome, status) in syndromes {
        assert_eq!((u32::from(ours.0), u32::from(ours.status().code())), (syndrome, status), "{ours}");
    }
    assert_eq!(u32::from(WcStatus::GeneralErr.code()), sys::IBV_WC_GENERAL_ERR);
    let work = [
        (WcOpcode::Send, sys::IBV_WC_SEND),
        (WcOpcode::RdmaWrite, sys::IBV_WC_RDMA_WRITE),
        (WcOpcode::RdmaRead, sys::IBV_WC_RDMA_READ),
        (WcOpcode::CompSwap, sys::IBV_WC_COMP_SWAP),
        (WcOpcode::FetchAdd, sys::IBV_WC_FETCH_ADD),
        (WcOpcode::Recv, sys::IBV_WC_RECV),
        (WcOpcode::RecvRdmaWithImm, sys::IBV_WC_RECV_RDMA_WITH_IMM),
    ];
    for (ours, theirs) in work {
        assert_eq!(u32::from(ours.code()), theirs, "{ours:?}");
    }
}

#[test]
fn path_numbers_are_those_of_the_headers() {
    let mtus = [sys::IBV_MTU_256, sys::IBV_MTU_512, sys::IBV_MTU_1024, sys::IBV_MTU_2048, sys::IBV_MTU_4096];
    assert_eq!(PathMtu::ALL.map(|mtu| u32::from(mtu.code())), mtus);
    // The verbs number states otherwise than the device from SQD on.
    let states = [sys::IBV_QPS_RESET, sys::IBV_QPS_INIT, sys::IBV_QPS_RTR, sys::IBV_QPS_RTS];
    let ours = [QpState::Reset, QpState::Init, QpState::Rtr, QpState::Rts];
    assert_eq!(ours.map(|state| u32::from(state.code())), states);
}
