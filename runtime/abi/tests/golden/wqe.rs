//! `wqe.txt`: what libmlx5 posts, and how it reads completions.

use ibex_abi::cqe::{Cqe, Cqe64, CqeOpcode, ErrorCqe, OpOwn, Syndrome, VendorSyndrome, WcOpcode, WcStatus};
use ibex_abi::doorbell::{Doorbell, DoorbellRecord};
use ibex_abi::types::{Iova, QpNum, Rkey};
use ibex_abi::wqe::{AtomicOp, Ctrl, DataSeg, Remote, Request, SegmentBuf, Wqe};
use zerocopy::IntoBytes;

use super::text::{hex, lines, number, value};

/// Numbers that the file's first line fixes for all entries.
struct Setup {
    qpn: QpNum,
    lkey: u32,
    buf: u64,
}

/// One entry as the file shows it.
struct Posted {
    title: String,
    ds: u64,
    num_wqebbs: u64,
    send_record: u32,
    bytes: Vec<u8>,
}

/// What the file holds, all of it.
#[derive(Default)]
struct Golden {
    posted: Vec<Posted>,
    /// Index of the entry above, and the line.
    completions: Vec<(usize, String)>,
    register: Vec<u8>,
    syndromes: Vec<String>,
}

fn read() -> (Setup, Golden) {
    let mut lines = lines("wqe.txt").into_iter();
    let (_, first) = lines.next().unwrap();
    let setup = Setup {
        qpn: QpNum::new(value(&first, "qpn") as u32),
        lkey: value(&first, "lkey") as u32,
        buf: value(&first, "buf"),
    };
    let mut golden = Golden::default();
    for (at, line) in lines {
        let text = line.trim();
        if let Some(rest) = text.strip_prefix("WQE ") {
            golden.posted.push(posted(rest));
        } else if let Some(rest) = text.strip_prefix("CQE->wc: ") {
            golden.completions.push((golden.posted.len() - 1, rest.to_owned()));
        } else if let Some(rest) = text.strip_prefix("syndrome ") {
            golden.syndromes.push(rest.to_owned());
        } else if text.starts_with("BF register contents") {
            golden.register = hex(text.rsplit_once("00: ").unwrap().1);
        } else if let Some((offset, bytes)) = text.split_once(": ").filter(|_| line.starts_with("  ")) {
            let entry = golden.posted.last_mut().unwrap();
            assert_eq!(usize::from_str_radix(offset, 16), Ok(entry.bytes.len()), "line {at}");
            entry.bytes.extend(hex(bytes));
        } else {
            assert!(text.starts_with("---") || text == "cancelled=1", "line {at}: {line:?}");
        }
    }
    (setup, golden)
}

fn posted(rest: &str) -> Posted {
    let (title, sizes) = rest.split_once(" ds=").unwrap();
    let (ds, sizes) = sizes.split_once(" (").unwrap();
    let (num_wqebbs, record) = sizes.split_once(" WQEBB) dbrec[SND]=").unwrap();
    Posted {
        title: title.trim().to_owned(),
        ds: number(ds),
        num_wqebbs: number(num_wqebbs),
        send_record: u32::from_str_radix(record, 16).unwrap(),
        bytes: Vec::new(),
    }
}

/// What each entry asks for, by its title; built from numbers, not from the bytes.
fn meaning(setup: &Setup, title: &str) -> Request {
    let remote_at = |offset, rkey| Remote { addr: Iova(setup.buf + offset), rkey: Rkey(rkey) };
    let remote = remote_at(0x2000, setup.lkey);
    let bad_remote = remote_at(0x2000, 0xb_ad00);
    let local = |len| DataSeg::new(len, setup.lkey, setup.buf);
    let gather = |len| vec![SegmentBuf::Data(local(len))];
    let inline = |len| vec![SegmentBuf::Inline(vec![0x5a; len])];
    match title {
        "RDMA_WRITE 7168B" | "wr_rdma_write" => Request::Write { remote, payload: gather(7168) },
        "RDMA_WRITE inline 1B" => Request::Write { remote, payload: inline(1) },
        "RDMA_WRITE inline 8B" => Request::Write { remote, payload: inline(8) },
        "RDMA_WRITE inline 12B" => Request::Write { remote, payload: inline(12) },
        "RDMA_WRITE inline 28B" => Request::Write { remote, payload: inline(28) },
        "RDMA_WRITE inline 40B" => Request::Write { remote, payload: inline(40) },
        "RDMA_WRITE 0 sge" => Request::Write { remote, payload: vec![] },
        "RDMA_WRITE bad rkey" | "next (flushed)" => {
            Request::Write { remote: bad_remote, payload: gather(64) }
        }
        "RDMA_WRITE_IMM" => Request::WriteImm { remote, payload: gather(64) },
        "RDMA_READ 4096" => Request::Read { remote, scatter: vec![local(4096)] },
        "SEND" => Request::Send { payload: gather(64) },
        "FETCH_ADD" => Request::Atomic {
            remote: remote_at(0x4000, setup.lkey),
            op: AtomicOp::FetchAdd { add: 0x0102_0304_0506_0708 },
            result: local(8),
        },
        "cancelled->NOP" => {
            // Only the opcode byte of a write changed: its body is still there.
            let ctrl = Ctrl::signaled(0, setup.qpn);
            let mut bytes = [0; 64];
            let write = Request::Write { remote, payload: gather(64) };
            let len = Wqe { ctrl, request: write }.emit(&mut bytes).unwrap();
            Request::Nop { body: bytes[16..len].as_chunks().0.to_vec() }
        }
        other => panic!("no meaning for the entry {other:?}"),
    }
}

#[test]
fn every_wqe_is_encoded_byte_for_byte_and_decoded_back() {
    let (setup, golden) = read();
    assert_eq!(golden.posted.len(), 15);
    for entry in &golden.posted {
        let title = &entry.title;
        let end = u16::try_from(entry.send_record).unwrap();
        let first = end - u16::try_from(entry.num_wqebbs).unwrap();
        let imm = if title == "RDMA_WRITE_IMM" { 0xdead_beef } else { 0 };
        let ctrl = Ctrl { imm, ..Ctrl::signaled(first, setup.qpn) };
        let wqe = Wqe { ctrl, request: meaning(&setup, title) };

        let mut out = vec![0xa5; entry.bytes.len() + 64];
        let len = wqe.emit(&mut out).unwrap();
        assert_eq!(out[..len], entry.bytes, "{title}");
        assert!(out[len..].iter().all(|&byte| byte == 0xa5), "{title} wrote past its end");
        assert_eq!(Wqe::parse(&entry.bytes), Ok(wqe.clone()), "{title}");
        assert_eq!(u64::from(wqe.ds().unwrap()), entry.ds, "{title}");
        assert_eq!(u64::from(wqe.num_wqebbs().unwrap()), entry.num_wqebbs, "{title}");

        let record = DoorbellRecord::new(0, end);
        assert_eq!(record.as_bytes()[4..], entry.send_record.to_be_bytes(), "{title}");
        let doorbell = Doorbell::from_bytes(entry.bytes[..8].try_into().unwrap());
        assert_eq!((doorbell.qpn(), doorbell.producer_idx()), (setup.qpn, end), "{title}");
    }
}

#[test]
fn the_doorbell_register_covers_the_last_wqe_of_the_batch() {
    let (setup, golden) = read();
    let doorbell = Doorbell::from_bytes(golden.register.as_slice().try_into().unwrap());
    assert_eq!((doorbell.qpn(), doorbell.producer_idx()), (setup.qpn, 0x13));
}

/// Parts of a `CQE->wc` line.
struct WorkCompletion {
    status: u8,
    description: String,
    opcode: u64,
    byte_len: u32,
    vendor: u64,
    qpn: QpNum,
}

fn work_completion(line: &str) -> WorkCompletion {
    let (status, rest) = line.strip_prefix("status=").unwrap().split_once('(').unwrap();
    let (description, rest) = rest.split_once(") ").unwrap();
    WorkCompletion {
        status: status.parse().unwrap(),
        description: description.to_owned(),
        opcode: value(rest, "opcode"),
        byte_len: value(rest, "byte_len") as u32,
        vendor: value(rest, "vendor"),
        qpn: QpNum::new(value(rest, "qp") as u32),
    }
}

/// The completion that the device wrote for an entry: a success.
fn good_cqe(wqe: &Wqe, wc: &WorkCompletion) -> Cqe64 {
    let is_receive = wc.opcode >= 0x80;
    let opcode = match (&wqe.request, is_receive) {
        (Request::WriteImm { .. }, true) => CqeOpcode::RespWriteImm,
        (Request::Send { .. }, true) => CqeOpcode::RespSend,
        _ => CqeOpcode::Req,
    };
    let wqe_opcode = if is_receive { 0 } else { wqe.opcode().0.byte() };
    Cqe64::new(wqe_opcode, wc.qpn, wc.byte_len, wqe.ctrl.wqe_idx, OpOwn::new(opcode, false))
}

#[test]
fn every_completion_decodes_to_the_verdict_of_libmlx5() {
    let (_, golden) = read();
    let (mut good, mut failed) = (0, 0);
    for (entry, line) in &golden.completions {
        let wqe = Wqe::parse(&golden.posted[*entry].bytes).unwrap();
        let wc = work_completion(line);
        if wc.status == 0 {
            good += 1;
            let bytes = good_cqe(&wqe, &wc);
            let Ok(Cqe::Good(opcode, cqe)) = Cqe::parse(bytes.as_bytes()) else { panic!("{line}") };
            assert_eq!(wc.description, WcStatus::Success.description());
            assert_eq!((cqe.qpn(), cqe.byte_cnt.get()), (wc.qpn, wc.byte_len));
            // A cancelled request reports what it was before; the CQE cannot know.
            if !matches!(wqe.request, Request::Nop { .. }) {
                let reported = WcOpcode::of(opcode, cqe.wqe_opcode()).unwrap();
                assert_eq!(u64::from(reported.code()), wc.opcode, "{line}");
            }
            continue;
        }
        failed += 1;
        let named = Syndrome::ALL.into_iter().find(|syndrome| syndrome.status().code() == wc.status);
        let syndrome = named.unwrap_or_else(|| panic!("no syndrome gives {line:?}"));
        let vendor = syndrome.usual_vendor().unwrap();
        assert_eq!(u64::from(vendor.0), wc.vendor, "{line}");
        let op_own = OpOwn::new(CqeOpcode::ReqErr, false);
        let opcode = wqe.opcode().0.byte();
        let bytes = ErrorCqe::new(syndrome, vendor, opcode, wc.qpn, wqe.ctrl.wqe_idx, op_own);
        let Ok(Cqe::Error(CqeOpcode::ReqErr, cqe)) = Cqe::parse(bytes.as_bytes()) else { panic!("{line}") };
        let status = Syndrome(cqe.syndrome).status();
        assert_eq!((status.description(), cqe.qpn()), (wc.description.as_str(), wc.qpn));
    }
    assert_eq!((good, failed), (16, 2));
}

#[test]
fn every_syndrome_decodes_to_the_status_of_libmlx5() {
    let (_, golden) = read();
    let mut seen = Vec::new();
    for line in &golden.syndromes {
        let (code, rest) = line.split_once(" -> ").unwrap();
        let (status, rest) = rest.split_once(' ').unwrap();
        let (description, vendor) = rest.rsplit_once(" vendor=").unwrap();
        let mut bytes = [0; 64];
        bytes[0x36] = number(vendor) as u8;
        bytes[0x37] = number(code) as u8;
        bytes[0x3f] = 0xd0;
        let Ok(Cqe::Error(CqeOpcode::ReqErr, cqe)) = Cqe::parse(&bytes) else { panic!("{line}") };
        let syndrome = Syndrome(cqe.syndrome);
        assert_eq!(u64::from(syndrome.status().code()), number(status), "{line}");
        assert_eq!(syndrome.status().description(), description);
        assert_eq!(VendorSyndrome(cqe.vendor_err_synd), VendorSyndrome(0x99));
        seen.push(syndrome);
    }
    assert_eq!(seen, Syndrome::ALL);
}
