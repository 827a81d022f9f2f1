//! What must hold for any bytes and any value: parsers do not panic, formats round-trip, fields
//! stay within their bits.

use ibex_abi::cqe::{CompletionWord, Cqe, OpOwn, completion_word};
use ibex_abi::doorbell::Doorbell;
use ibex_abi::prm::{self, Field};
use ibex_abi::types::{Iova, Psn, QpNum, Rkey};
use ibex_abi::wqe::{
    AtomicOp, Ctrl, CtrlFlags, CtrlSeg, DataSeg, InlineHeader, Opcode, Payload, Remote, Request, RequestView,
    SegmentBuf, Wqe, WqeError, WqeView, recv_segments,
};
use proptest::collection::vec;
use proptest::prelude::*;
use zerocopy::IntoBytes;

fn qpn() -> impl Strategy<Value = QpNum> {
    (0..=QpNum::MAX.get()).prop_map(QpNum::new)
}

fn ctrl() -> impl Strategy<Value = Ctrl> {
    (any::<u16>(), qpn(), any::<u8>(), any::<u32>(), any::<u8>(), any::<u16>()).prop_map(
        |(wqe_idx, qpn, flags, imm, signature, dci_stream)| Ctrl {
            wqe_idx,
            qpn,
            flags: CtrlFlags(flags),
            imm,
            signature,
            dci_stream,
        },
    )
}

fn remote() -> impl Strategy<Value = Remote> {
    (any::<u64>(), any::<u32>()).prop_map(|(addr, rkey)| Remote { addr: Iova(addr), rkey: Rkey(rkey) })
}

fn data() -> impl Strategy<Value = DataSeg> {
    (0..=DataSeg::BYTE_COUNT_MAX, any::<u32>(), any::<u64>())
        .prop_map(|(len, lkey, addr)| DataSeg::new(len, lkey, addr))
}

/// Segments in any mixture, including empty inline ones; small enough for any request.
fn payload() -> impl Strategy<Value = Vec<SegmentBuf>> {
    let inline = vec(any::<u8>(), 0..100).prop_map(SegmentBuf::Inline);
    vec(prop_oneof![inline, data().prop_map(SegmentBuf::Data)], 0..6)
}

fn atomic_op() -> impl Strategy<Value = AtomicOp> {
    let wide = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>());
    let narrow = (any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>());
    (0..6, wide, narrow).prop_map(|(which, (a, b, c, d), (e, f, g, h))| match which {
        0 => AtomicOp::FetchAdd { add: a },
        1 => AtomicOp::CmpSwap { swap: a, compare: b },
        2 => AtomicOp::MaskedFetchAdd32 { add: e, field_boundary: f },
        3 => AtomicOp::MaskedFetchAdd64 { add: a, field_boundary: b },
        4 => AtomicOp::MaskedCmpSwap32 { swap: e, compare: f, swap_mask: g, compare_mask: h },
        _ => AtomicOp::MaskedCmpSwap64 { swap: a, compare: b, swap_mask: c, compare_mask: d },
    })
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        vec(any::<[u8; 16]>(), 0..10).prop_map(|body| Request::Nop { body }),
        payload().prop_map(|payload| Request::Send { payload }),
        payload().prop_map(|payload| Request::SendImm { payload }),
        payload().prop_map(|payload| Request::SendInval { payload }),
        payload().prop_map(|payload| Request::Dump { payload }),
        (remote(), payload()).prop_map(|(remote, payload)| Request::Write { remote, payload }),
        (remote(), payload()).prop_map(|(remote, payload)| Request::WriteImm { remote, payload }),
        (remote(), vec(data(), 0..10)).prop_map(|(remote, scatter)| Request::Read { remote, scatter }),
        (remote(), atomic_op(), data()).prop_map(|(remote, op, result)| Request::Atomic {
            remote,
            op,
            result
        }),
    ]
}

fn wqe() -> impl Strategy<Value = Wqe> {
    (ctrl(), request()).prop_map(|(ctrl, request)| Wqe { ctrl, request })
}

/// Bytes that get past the control segment's checks, so that the segments behind it are reached.
fn plausible_bytes() -> impl Strategy<Value = Vec<u8>> {
    let opcode = prop_oneof![
        4 => (0..Opcode::ALL.len()).prop_map(|at| Opcode::ALL[at].byte()),
        1 => any::<u8>(),
    ];
    // Lengths near the end of the entry, so that inline segments both fit and do not.
    let header = (0..120u32).prop_map(|len| (InlineHeader::FLAG | len).to_be_bytes());
    let parts = (vec(any::<u8>(), 256), opcode, 0..18u8, any::<bool>(), header, 1..4usize);
    parts.prop_map(|(mut bytes, opcode, ds, masked, header, at)| {
        bytes[0] = if masked { 0x08 | bytes[0] & 1 } else { bytes[0] };
        bytes[3] = opcode;
        bytes[7] = ds;
        bytes[16 * at..16 * at + 4].copy_from_slice(&header);
        bytes
    })
}

/// Follows every reference that a parsed view gives out.
fn touch(view: &WqeView<'_>) -> u64 {
    let sum = |payload: &Payload<'_>| {
        assert_eq!(payload.is_empty(), payload.segments().count() == 0);
        payload.byte_len()
    };
    match &view.request {
        RequestView::Nop => 0,
        RequestView::Send { payload } | RequestView::Dump { payload } => sum(payload),
        RequestView::Write { remote, payload } => remote.raddr.get() ^ sum(payload),
        RequestView::Read { remote, scatter } => remote.raddr.get() ^ sum(scatter),
        RequestView::Atomic { op, result, .. } => u64::from(op.operand_len()) ^ result.byte_len(),
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(view) = WqeView::parse(&bytes) {
            touch(&view);
        }
        let _ = Wqe::parse(&bytes);
        let _ = Cqe::parse(&bytes);
        let _ = recv_segments(&bytes).count();
        let _ = (prm::op_of(&bytes), prm::status_of(&bytes));
    }

    #[test]
    fn plausible_bytes_never_panic_and_what_parses_is_stable(bytes in plausible_bytes()) {
        if let Ok(view) = WqeView::parse(&bytes) {
            touch(&view);
            let wqe = Wqe::parse(&bytes).unwrap();
            let mut out = [0xa5; 1024];
            let len = wqe.emit(&mut out).unwrap();
            prop_assert_eq!(len, usize::from(view.ctrl.ds()) * 16);
            prop_assert_eq!(Wqe::parse(&out[..len]), Ok(wqe));
        } else {
            prop_assert!(Wqe::parse(&bytes).is_err());
        }
    }

    #[test]
    fn a_wqe_survives_the_round_trip(wqe in wqe()) {
        let mut out = [0xa5; 1024];
        match wqe.emit(&mut out) {
            Ok(len) => {
                prop_assert!(out[len..].iter().all(|&byte| byte == 0xa5));
                let view = WqeView::parse(&out[..len]).unwrap();
                prop_assert_eq!(view.ctrl.num_wqebbs(), wqe.num_wqebbs().unwrap());
                let doorbell = Doorbell::from_bytes(out[..8].try_into().unwrap());
                let end = wqe.ctrl.wqe_idx.wrapping_add(view.ctrl.num_wqebbs());
                prop_assert_eq!((doorbell.qpn(), doorbell.producer_idx()), (wqe.ctrl.qpn, end));
                for cut in 0..len {
                    let parsed = Wqe::parse(&out[..cut]);
                    let truncated = matches!(parsed, Err(WqeError::Truncated { .. }));
                    prop_assert!(truncated, "{:?}", parsed);
                    let mut short = vec![0xa5; cut];
                    prop_assert!(wqe.emit(&mut short).is_err());
                    prop_assert!(short.iter().all(|&byte| byte == 0xa5));
                }
                prop_assert_eq!(Wqe::parse(&out), Ok(wqe));
            }
            Err(error) => {
                let too_long = matches!(error, WqeError::TooLong { ds } if ds > 63);
                prop_assert!(too_long, "{}", error);
            }
        }
    }

    #[test]
    fn setting_a_field_changes_its_bits_and_no_others(
        before in any::<[u8; 24]>(), bit_off in 0..128u32, width in 1..=64u32, value: u64,
    ) {
        let field = Field::new(bit_off, width);
        let value = value & field.value_max();
        let mut bytes = before;
        prm::set(&mut bytes, field, value);
        prop_assert_eq!(prm::get(&bytes, field), value);
        for bit in 0..24 * 8u32 {
            let read = |bytes: &[u8]| bytes[bit as usize / 8] >> (7 - bit % 8) & 1 == 1;
            let expected = match bit.checked_sub(bit_off) {
                Some(inside) if inside < width => value >> (width - 1 - inside) & 1 == 1,
                _ => read(&before),
            };
            prop_assert_eq!(read(&bytes), expected, "bit {}", bit);
        }
        let short = field.bytes().end - 1;
        prop_assert_eq!(prm::try_get(&bytes[..short], field), None);
        prop_assert_eq!(prm::try_get(&bytes[..=short], field), Some(value));
    }

    #[test]
    fn psn_distance_undoes_addition(start: u32, step in -0x80_0000..0x80_0000i32) {
        let start = Psn::new(start);
        let end = start.plus(step.cast_unsigned());
        prop_assert_eq!(end.distance_from(start), step);
        prop_assert_eq!(end.is_after(start), step > 0);
    }

    #[test]
    fn the_completion_word_is_one_word(counter: u16, signature: u8, op_own: u8) {
        let bytes = completion_word(counter, signature, OpOwn(op_own));
        let word = CompletionWord::from_register(u32::from_ne_bytes(bytes));
        prop_assert_eq!(word.as_bytes(), bytes);
        prop_assert_eq!((word.wqe_counter.get(), word.op_own()), (counter, OpOwn(op_own)));
    }
}

#[test]
fn each_malformed_entry_is_refused_with_its_reason() {
    let entry = |opmod, opcode, ds| {
        let mut bytes = [0; 128];
        let ctrl = CtrlSeg::new(opmod, 0, opcode, QpNum::new(1), ds, CtrlFlags::SIGNALED);
        bytes[..16].copy_from_slice(ctrl.as_bytes());
        bytes
    };
    let refused = |bytes: &[u8]| WqeView::parse(bytes).unwrap_err();

    assert_eq!(refused(&[0; 15]), WqeError::Truncated { needed: 16, len: 15 });
    let write = entry(0, Opcode::RdmaWrite, 3);
    assert_eq!(refused(&write[..47]), WqeError::Truncated { needed: 48, len: 47 });
    assert_eq!(refused(&entry(0, Opcode::RdmaWrite, 0)), WqeError::Empty);
    let mut unknown = write;
    unknown[3] = 0x7f;
    assert_eq!(refused(&unknown), WqeError::UnknownOpcode(0x7f));
    assert_eq!(refused(&entry(0, Opcode::Umr, 3)), WqeError::UnsupportedOpcode(Opcode::Umr));

    let missing = |opcode, ds, segment| WqeError::MissingSegment { opcode, ds, segment };
    for opcode in [Opcode::RdmaWrite, Opcode::RdmaRead, Opcode::AtomicFa] {
        assert_eq!(refused(&entry(0, opcode, 1)), missing(opcode, 1, "remote address"));
    }
    let fetch_add = |ds| refused(&entry(0, Opcode::AtomicFa, ds));
    assert_eq!(fetch_add(2), missing(Opcode::AtomicFa, 2, "operand"));
    assert_eq!(fetch_add(3), missing(Opcode::AtomicFa, 3, "result"));
    assert_eq!(fetch_add(5), WqeError::TrailingSegments { opcode: Opcode::AtomicFa, ds: 5 });
    let wide = refused(&entry(9, Opcode::AtomicMaskedCs, 3));
    assert_eq!(wide, missing(Opcode::AtomicMaskedCs, 3, "operand"));
    let opcode = Opcode::AtomicMaskedFa;
    assert_eq!(refused(&entry(7, opcode, 4)), WqeError::OperandSize { opcode, opmod: 7 });

    let mut inline = write;
    inline[32..36].copy_from_slice(InlineHeader::new(12).as_bytes());
    assert!(WqeView::parse(&inline).is_ok());
    inline[32..36].copy_from_slice(InlineHeader::new(13).as_bytes());
    assert_eq!(refused(&inline), WqeError::InlineOverrun { offset: 32, len: 13, end: 48 });
    inline[3] = Opcode::RdmaRead.byte();
    inline[32..36].copy_from_slice(InlineHeader::new(12).as_bytes());
    assert_eq!(refused(&inline), WqeError::InlineScatter(Opcode::RdmaRead));
    let mut atomic = entry(0, Opcode::AtomicCs, 4);
    atomic[48..52].copy_from_slice(InlineHeader::new(8).as_bytes());
    assert_eq!(refused(&atomic), WqeError::InlineScatter(Opcode::AtomicCs));
}

#[test]
fn a_list_of_receive_segments_ends_at_the_invalid_key() {
    let mut stride = Vec::new();
    for seg in [DataSeg::new(1, 2, 3), DataSeg::new(4, 5, 6), DataSeg::new(0, 0x100, 0)] {
        stride.extend_from_slice(seg.as_bytes());
    }
    stride.extend_from_slice(DataSeg::new(7, 8, 9).as_bytes());
    let addrs: Vec<u64> = recv_segments(&stride).map(|seg| seg.addr.get()).collect();
    assert_eq!(addrs, [3, 6]);
    assert_eq!(recv_segments(&stride[..32]).count(), 2);
}

#[test]
#[should_panic(expected = "does not fit")]
fn a_value_wider_than_its_field_is_never_written() {
    prm::set(&mut [0; 4], Field::new(0, 4), 16);
}
