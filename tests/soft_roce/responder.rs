//! Linux asks, our device answers.

use ibex_abi::cqe::Syndrome;

use super::guest::{Guest, pattern, status};
use super::ours::{MEMORY_LEN, Ours, Pair, Spec};
use super::requester::{Check, lengths};

/// What our memory holds behind a message.
const BACKGROUND: u64 = 77;
const BEHIND: usize = 64;

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("Linux' writes of every size land, and only they", writes),
    ("Linux' reads of every size come back", reads),
    ("Linux' atomics change memory and return what it held", atomics),
    ("Linux' sends and immediate data complete receives", sends),
    ("Linux begins too late: NAK 0x60, until its retries are exceeded", sequence_errors),
    ("Linux names an unknown key, or too long a range: NAK 0x62, nothing written", access_errors),
    ("Linux' send is too long for its receive: NAK 0x61, and our receive fails", invalid_request),
    ("nobody answers Linux: retries exceeded", retry_exceeded),
    ("no receive is posted for Linux: RNR retries exceeded", rnr_exceeded),
];

fn writes(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let pair = ours.connect(guest, Spec::new(mtu));
    for (seed, len) in (1..).zip(lengths(mtu)) {
        pair.fill(len as u64, BEHIND, BACKGROUND);
        guest.fill(pair.guest_memory, 0, len as u64, seed);
        pair.guest_posts(guest, "write", &format!("0 {len} {}", pair.target(0)));
        pair.expect_status(guest, status::SUCCESS);
        assert!(pair.get(0, len) == pattern(len, seed), "{len} bytes");
        assert_eq!(pair.get(len as u64, BEHIND), pattern(BEHIND, BACKGROUND), "behind {len} bytes");
    }
}

fn reads(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let pair = ours.connect(guest, Spec::new(mtu));
    for (seed, len) in (1..).zip(lengths(mtu)) {
        pair.fill(0, len, seed);
        guest.fill(pair.guest_memory, len as u64, BEHIND as u64, BACKGROUND);
        pair.guest_posts(guest, "read", &format!("0 {len} {}", pair.target(0)));
        pair.expect_status(guest, status::SUCCESS);
        assert_eq!(guest.differs(pair.guest_memory, 0, len as u64, seed), 0, "{len} bytes");
        let behind = guest.differs(pair.guest_memory, len as u64, BEHIND as u64, BACKGROUND);
        assert_eq!(behind, 0, "behind {len} bytes");
    }
}

/// Has the guest change our word at 8; gives what it was told the word had been.
pub(super) fn atomic(guest: &mut Guest, pair: &Pair, verb: &str, operands: &str) -> u64 {
    pair.guest_posts(guest, verb, &format!("64 {} {operands}", pair.target(8)));
    pair.expect_status(guest, status::SUCCESS);
    let bytes = guest.peek(pair.guest_memory, 64, 8);
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

fn atomics(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let pair = ours.connect(guest, Spec::new(mtu));
    pair.memory.view().write(8, &40_u64.to_ne_bytes());
    for (verb, operands, old, new) in [
        ("fetch_add", "2", 40, 42),
        ("fetch_add", "0xffffffffffffffff", 42, 41),
        ("cmp_swap", "42 7", 41, 41),
        ("cmp_swap", "41 7", 41, 7),
    ] {
        assert_eq!(atomic(guest, &pair, verb, operands), old, "{verb} {operands}");
        assert_eq!(pair.word(8), new, "{verb} {operands}");
    }
}

fn sends(guest: &mut Guest, ours: &Ours, mtu: u32) {
    const IMM: u32 = 0xa1b2_c3d4;
    let mut pair = ours.connect(guest, Spec::new(mtu));
    for nth in 0..3 {
        let segment = pair.data(8192 * nth, 8192);
        pair.qp.post_recv(&[segment]).expect("room in the queue");
    }
    let len = 5001;
    guest.fill(pair.guest_memory, 0, len as u64, 3);
    pair.guest_posts(guest, "send", &format!("0 {len}"));
    pair.guest_posts(guest, "send_imm", &format!("0 {len} {IMM}"));
    pair.guest_posts(guest, "write_imm", &format!("0 {len} {} {IMM}", pair.target(8192 * 2)));
    for (nth, imm) in [(0, None), (1, Some(IMM)), (2, Some(IMM))] {
        pair.expect_status(guest, status::SUCCESS);
        let done = pair.received();
        assert_eq!((done.syndrome(), u64::from(done.wqe_counter)), (None, nth), "{done:?}");
        assert_eq!(done.byte_cnt as usize, len);
        if let Some(imm) = imm {
            assert_eq!(done.imm, imm);
        }
        assert!(pair.get(8192 * nth, len) == pattern(len, 3), "message {nth}");
    }
}

fn sequence_errors(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let pair = ours.connect(guest, Spec { guest_skips: 1, ..Spec::impatient(mtu, 13, 2) });
    guest.fill(pair.guest_memory, 0, 8, 1);
    let heard = guest.counter("rcvd_pkts");
    pair.guest_posts(guest, "write", &format!("0 8 {}", pair.target(0)));
    // Another answer than this NAK would end the request in another way.
    pair.expect_status(guest, status::RETRY_EXCEEDED);
    assert!(guest.counter("rcvd_pkts") > heard, "Linux heard our NAK");
    assert_eq!(pair.get(0, 8), [0; 8]);
}

fn access_errors(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut fails = |offset: u64, key_change: u32| {
        let refused = ours.device.counters().packets.refused;
        let pair = ours.connect(guest, Spec::new(mtu));
        guest.fill(pair.guest_memory, 0, 16, 1);
        let key = pair.memory.key().rkey.get() ^ key_change;
        pair.guest_posts(guest, "write", &format!("0 16 {} {key}", pair.memory.iova(offset)));
        pair.guest_posts(guest, "write", &format!("0 16 {}", pair.target(0)));
        pair.expect_status(guest, status::REMOTE_ACCESS);
        pair.expect_status(guest, status::FLUSHED);
        assert_eq!(ours.device.counters().packets.refused, refused + 1);
        assert!(pair.get(0, MEMORY_LEN as usize).iter().all(|&byte| byte == 0), "a byte was written");
    };
    fails(MEMORY_LEN - 8, 0);
    fails(0, 0x100);
}

fn invalid_request(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut pair = ours.connect(guest, Spec::new(mtu));
    let segment = pair.data(0, 16);
    pair.qp.post_recv(&[segment]).expect("room in the queue");
    pair.guest_posts(guest, "send", "0 17");
    pair.expect_status(guest, status::REMOTE_INVALID_REQUEST);
    let done = pair.received();
    assert_eq!(done.syndrome(), Some(Syndrome::LOCAL_LENGTH), "{done:?}");
}

fn retry_exceeded(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let unknown = ours.device.counters().packets.unknown_qp;
    let pair = ours.connect(guest, Spec { to_nobody: true, ..Spec::impatient(mtu, 13, 2) });
    pair.guest_posts(guest, "write", &format!("0 8 {}", pair.target(0)));
    pair.expect_status(guest, status::RETRY_EXCEEDED);
    assert!(ours.device.counters().packets.unknown_qp >= unknown + 3, "sent once and twice again");
}

fn rnr_exceeded(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let pair = ours.connect(guest, Spec { rnr_retry: 2, ..Spec::new(mtu) });
    pair.guest_posts(guest, "send", "0 8");
    pair.expect_status(guest, status::RNR_RETRY_EXCEEDED);
}
