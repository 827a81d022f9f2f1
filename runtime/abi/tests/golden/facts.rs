//! Single facts from public sources that the larger files do not hold.
//!
//! Entries and completions marked "libmlx5" were produced by the unmodified libmlx5 of Debian 12
//! (rdma-core 44) like those in `wqe.txt`; the others name their source.

use ibex_abi::cqe::{Cqe, Cqe64, CqeOpcode, ErrorCqe, OpOwn, Syndrome, VendorSyndrome};
use ibex_abi::doorbell::Doorbell;
use ibex_abi::types::{Iova, QpNum, Rkey};
use ibex_abi::wqe::{
    AtomicOp, CqUpdate, Ctrl, CtrlFlags, DataSeg, FenceMode, Remote, Request, SegmentBuf, Wqe,
};
use zerocopy::{FromZeros, IntoBytes};

use super::text::hex;

const REMOTE: Remote = Remote { addr: Iova(0x5583_4fb6_e000), rkey: Rkey(0x1000) };

fn local(len: u32) -> DataSeg {
    DataSeg::new(len, 0x1000, 0x5583_4fb6_c000)
}

/// Asserts both directions; the output buffer is dirty.
fn assert_encodes(wqe: &Wqe, expected: &str) {
    let expected = hex(expected);
    let mut out = [0xa5; 128];
    let len = wqe.emit(&mut out).unwrap();
    assert_eq!(out[..len], expected);
    assert_eq!(Wqe::parse(&expected).as_ref(), Ok(wqe));
}

#[test]
fn compare_and_swap_is_swap_then_compare() {
    // libmlx5.
    let op = AtomicOp::CmpSwap { swap: 0x2222_2222_2222_2222, compare: 0x1111_1111_1111_1111 };
    let request = Request::Atomic { remote: REMOTE, op, result: local(8) };
    let wqe = Wqe { ctrl: Ctrl::signaled(7, QpNum::new(0x100)), request };
    assert_encodes(
        &wqe,
        "00000711 00010004 00000008 00000000  000055834fb6e000 00001000 00000000
         2222222222222222 1111111111111111  00000008 00001000 000055834fb6c000",
    );
}

#[test]
fn a_fenced_solicited_signalled_send_with_immediate_has_flags_8a() {
    // libmlx5.
    let flags = CtrlFlags::new(FenceMode::SmallAndFence, CqUpdate::Always, true);
    let ctrl = Ctrl { flags, imm: 0xdead_beef, ..Ctrl::signaled(0, QpNum::new(0x100)) };
    let request = Request::SendImm { payload: vec![SegmentBuf::Data(local(64))] };
    assert_encodes(
        &Wqe { ctrl, request },
        "0000000b 00010002 0000008a deadbeef  00000040 00001000 000055834fb6c000",
    );
}

#[test]
fn masked_fetch_and_add_has_its_size_in_opmod() {
    // NVSHMEM ibgda headers: opmod 0x08 for 4 bytes, 0x09 for 8 bytes.
    let ctrl = Ctrl::signaled(1, QpNum::new(0x100));
    let op = AtomicOp::MaskedFetchAdd64 { add: 5, field_boundary: 1 << 63 };
    let request = Request::Atomic { remote: REMOTE, op, result: local(8) };
    assert_encodes(
        &Wqe { ctrl, request },
        "09000115 00010004 00000008 00000000  000055834fb6e000 00001000 00000000
         0000000000000005 8000000000000000  00000008 00001000 000055834fb6c000",
    );
    let op = AtomicOp::MaskedFetchAdd32 { add: 5, field_boundary: 0x8000_0000 };
    let request = Request::Atomic { remote: REMOTE, op, result: local(4) };
    assert_encodes(
        &Wqe { ctrl, request },
        "08000115 00010004 00000008 00000000  000055834fb6e000 00001000 00000000
         00000005 80000000 0000000000000000  00000004 00001000 000055834fb6c000",
    );
}

#[test]
fn masked_compare_and_swap_takes_one_or_two_operand_segments() {
    // NVSHMEM ibgda headers.
    let ctrl = Ctrl::signaled(1, QpNum::new(0x100));
    let op = AtomicOp::MaskedCmpSwap32 { swap: 1, compare: 2, swap_mask: 3, compare_mask: 4 };
    let request = Request::Atomic { remote: REMOTE, op, result: local(4) };
    assert_encodes(
        &Wqe { ctrl, request },
        "08000114 00010004 00000008 00000000  000055834fb6e000 00001000 00000000
         00000001 00000002 00000003 00000004  00000004 00001000 000055834fb6c000",
    );
    let op = AtomicOp::MaskedCmpSwap64 { swap: 1, compare: 2, swap_mask: 3, compare_mask: 4 };
    let request = Request::Atomic { remote: REMOTE, op, result: local(8) };
    assert_encodes(
        &Wqe { ctrl, request },
        "09000114 00010005 00000008 00000000  000055834fb6e000 00001000 00000000
         0000000000000001 0000000000000002  0000000000000003 0000000000000004
         00000008 00001000 000055834fb6c000",
    );
}

#[test]
fn a_doorbell_of_doca_names_the_producer_index_itself() {
    // DOCA GPUNetIO headers: {BE32(prod_index << 8), BE32(qpn << 8)}.
    let doorbell = Doorbell::from_bytes(hex("00001300 00010000").try_into().unwrap());
    assert_eq!((doorbell.qpn(), doorbell.producer_idx()), (QpNum::new(0x100), 0x13));
    assert_eq!(Doorbell::of_producer_idx(0x13, QpNum::new(0x100)), doorbell);
}

#[test]
fn the_good_completion_that_libmlx5_accepts_is_the_one_we_write() {
    // libmlx5: bytes 0x20..0x40 of a CQE that ibv_poll_cq took for a success.
    let tail = hex("00000000 00000000 00000000 00001c00 00000000 00000001 08000100 00000000");
    let mut cqe = Cqe64::new(8, QpNum::new(0x100), 0x1c00, 0, OpOwn::new(CqeOpcode::Req, false));
    cqe.timestamp.set(1);
    assert_eq!(cqe.as_bytes()[0x20..], tail);
    let mut bytes = [0xa5; 64];
    bytes[0x20..].copy_from_slice(&tail);
    let Ok(Cqe::Good(CqeOpcode::Req, read)) = Cqe::parse(&bytes) else { panic!("must be good") };
    assert_eq!((read.qpn(), read.wqe_opcode()), (QpNum::new(0x100), 8));
    assert_eq!((read.byte_cnt.get(), read.timestamp.get()), (0x1c00, 1));
    assert_eq!((read.word.wqe_counter.get(), read.word.op_own().owner()), (0, false));
}

#[test]
fn the_error_completion_that_libmlx5_accepts_is_the_one_we_write() {
    // libmlx5: bytes 0x30..0x40 of a CQE that ibv_poll_cq took for a remote access error.
    let tail = hex("00000000 00008813 08000100 001800d0");
    let op_own = OpOwn::new(CqeOpcode::ReqErr, false);
    let (syndrome, vendor) = (Syndrome::REMOTE_ACCESS, VendorSyndrome::REMOTE_ACCESS);
    let cqe = ErrorCqe::new(syndrome, vendor, 8, QpNum::new(0x100), 0x18, op_own);
    assert_eq!(cqe.as_bytes()[0x30..], tail);
}

#[test]
fn a_dump_from_hardware_decodes_although_spare_bits_are_set() {
    // UCX issue 1569: last 16 bytes of an error CQE; signature 0xf6, bit 1 of op_own set.
    let mut cqe = ErrorCqe::new_zeroed();
    cqe.as_mut_bytes()[0x30..].copy_from_slice(&hex("00000000 00008813 08006214 0000f6d2"));
    let Ok(Cqe::Error(CqeOpcode::ReqErr, read)) = Cqe::parse(cqe.as_bytes()) else {
        panic!("must be an error")
    };
    assert_eq!(Syndrome(read.syndrome), Syndrome::REMOTE_ACCESS);
    assert_eq!((read.qpn(), read.wqe_opcode()), (QpNum::new(0x6214), 8));
    assert_eq!((read.word.signature, read.word.op_own().owner()), (0xf6, false));
}

#[test]
fn vendor_syndromes_are_those_of_public_hardware_logs() {
    let pairs = [(0x15, 0x81), (0x13, 0x88), (0x12, 0x8a), (0x05, 0xf9), (0x04, 0x51), (0x22, 0x93)];
    for (syndrome, vendor) in pairs {
        assert_eq!(Syndrome(syndrome).usual_vendor(), Some(VendorSyndrome(vendor)));
    }
    assert_eq!(Syndrome::RNR_RETRY_EXC.usual_vendor(), None);
    assert_eq!(VendorSyndrome::LOCAL_PROT_KEY.0, 0x52);
    assert_eq!(VendorSyndrome::WQE_INDEX.0, 0x68);
}
