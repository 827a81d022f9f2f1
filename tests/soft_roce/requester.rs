//! Our device asks, Linux answers.

use ibex_abi::cqe::Syndrome;
use ibex_abi::types::Rkey;
use ibex_abi::wqe::{AtomicOp, CtrlFlags, Remote, Request};

use super::guest::{Guest, access, pattern};
use super::ours::{Ours, Pair, Spec};

/// What the guest's memory holds behind a message.
const BACKGROUND: u64 = 99;
/// Bytes behind a message that must stay as they are.
const BEHIND: u64 = 64;

/// A check between the guest and a device, with packets of this size.
pub(crate) type Check = fn(&mut Guest, &Ours, u32);

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("writes of every size land, and only they", writes),
    ("reads of every size come back", reads),
    ("atomics change memory and return what it held", atomics),
    ("sends and immediate data complete receives", sends),
    ("many requests are in flight together and complete in order", many_writes),
    ("an unknown key, or too long a range: remote access error, nothing written", access_errors),
    ("what the queue pair does not offer: remote invalid request", invalid_request),
    ("a send that is too long for its receive: remote operation error, as Linux has it", operation_error),
    ("nobody answers: retries exceeded, the rest flushed", retry_exceeded),
    ("no receive is posted: RNR retries exceeded", rnr_exceeded),
];

/// Message lengths around everything that changes with them.
pub(crate) fn lengths(mtu: u32) -> [usize; 8] {
    let mtu = mtu as usize;
    [1, 2, 3, mtu - 1, mtu, mtu + 1, 64 << 10, 1 << 20]
}

fn writes(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut pair = ours.connect(guest, Spec::new(mtu));
    for (seed, len) in (1..).zip(lengths(mtu)) {
        guest.fill(pair.guest_memory, len as u64, BEHIND, BACKGROUND);
        pair.fill(0, len, seed);
        pair.post(Request::Write { remote: pair.remote(0), payload: pair.payload(0, len) });
        pair.expect_good();
        assert_eq!(guest.differs(pair.guest_memory, 0, len as u64, seed), 0, "{len} bytes");
        assert_eq!(guest.differs(pair.guest_memory, len as u64, BEHIND, BACKGROUND), 0, "behind {len} bytes");
    }
}

fn reads(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut pair = ours.connect(guest, Spec::new(mtu));
    for (seed, len) in (1..).zip(lengths(mtu)) {
        guest.fill(pair.guest_memory, 0, len as u64, seed);
        pair.fill(len as u64, BEHIND as usize, BACKGROUND);
        pair.post(Request::Read { remote: pair.remote(0), scatter: vec![pair.data(0, len)] });
        pair.expect_good();
        assert!(pair.get(0, len) == pattern(len, seed), "{len} bytes");
        assert_eq!(pair.get(len as u64, BEHIND as usize), pattern(BEHIND as usize, BACKGROUND));
    }
}

/// Carries out `op` on the guest's word at 8; gives what it was and what it is.
fn atomic(guest: &mut Guest, pair: &mut Pair, op: AtomicOp) -> (u64, u64) {
    pair.post(Request::Atomic { remote: pair.remote(8), op, result: pair.data(64, 8) });
    pair.expect_good();
    let now = guest.peek(pair.guest_memory, 8, 8);
    (pair.word(64), u64::from_le_bytes(now.try_into().expect("eight bytes")))
}

fn atomics(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut pair = ours.connect(guest, Spec::new(mtu));
    guest.poke(pair.guest_memory, 8, &40_u64.to_le_bytes());
    for (op, old, new) in [
        (AtomicOp::FetchAdd { add: 2 }, 40, 42),
        (AtomicOp::FetchAdd { add: u64::MAX }, 42, 41),
        (AtomicOp::CmpSwap { swap: 7, compare: 42 }, 41, 41),
        (AtomicOp::CmpSwap { swap: 7, compare: 41 }, 41, 7),
    ] {
        assert_eq!(atomic(guest, &mut pair, op), (old, new), "{op:?}");
    }
}

fn sends(guest: &mut Guest, ours: &Ours, mtu: u32) {
    const IMM: u32 = 0x0102_0304;
    let mut pair = ours.connect(guest, Spec::new(mtu));
    for nth in 0..3 {
        pair.guest_posts(guest, "recv", &format!("{} 8192", 8192 * nth));
    }
    let len = 5001;
    pair.fill(0, len, 3);
    pair.post(Request::Send { payload: pair.payload(0, len) });
    let with_imm = [
        Request::SendImm { payload: pair.payload(0, len) },
        Request::WriteImm { remote: pair.remote(8192 * 2), payload: pair.payload(0, len) },
    ];
    for request in with_imm {
        pair.qp.post_imm(CtrlFlags::SIGNALED, IMM, request).expect("room in the queue");
    }
    for (nth, imm) in [(0, 0), (1, IMM), (2, IMM)] {
        pair.expect_good();
        let done = guest.completion(pair.guest_qp);
        assert_eq!((done.wr_id, done.status, done.len), (nth, 0, len as u64));
        assert_eq!(done.imm, u64::from(imm));
        assert_eq!(guest.differs(pair.guest_memory, 8192 * nth, len as u64, 3), 0);
    }
}

fn many_writes(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut pair = ours.connect(guest, Spec::new(mtu));
    let len = 3 * mtu as usize + 1;
    for nth in 0..16 {
        let offset = nth * (len as u64 + 7);
        pair.fill(offset, len, nth);
        pair.post(Request::Write { remote: pair.remote(offset), payload: pair.payload(offset, len) });
    }
    for nth in 0..16 {
        pair.expect_good();
        let offset = nth * (len as u64 + 7);
        assert_eq!(guest.differs(pair.guest_memory, offset, len as u64, nth), 0, "write {nth}");
    }
}

fn access_errors(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut fails = |change: fn(&mut Remote)| {
        let mut pair = ours.connect(guest, Spec::new(mtu));
        let mut remote = pair.remote(super::ours::MEMORY_LEN - 8);
        change(&mut remote);
        pair.fill(0, 16, 1);
        pair.post(Request::Write { remote, payload: pair.payload(0, 16) });
        pair.expect_error(Syndrome::REMOTE_ACCESS);
        assert_eq!(guest.peek(pair.guest_memory, super::ours::MEMORY_LEN - 8, 8), [0; 8]);
    };
    // Half of it lies behind the region.
    fails(|_| {});
    fails(|remote| remote.rkey = Rkey(remote.rkey.get() ^ 0x100));
}

fn invalid_request(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut pair = ours.connect(guest, Spec { guest_access: access::LOCAL_WRITE, ..Spec::new(mtu) });
    pair.fill(0, 8, 1);
    pair.post(Request::Write { remote: pair.remote(0), payload: pair.payload(0, 8) });
    pair.expect_error(Syndrome::REMOTE_INVAL_REQ);
    assert_eq!(guest.peek(pair.guest_memory, 0, 8), [0; 8]);
}

fn operation_error(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut pair = ours.connect(guest, Spec::new(mtu));
    pair.guest_posts(guest, "recv", "0 16");
    pair.post(Request::Send { payload: pair.payload(0, 17) });
    pair.expect_error(Syndrome::REMOTE_OP);
}

fn retry_exceeded(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut pair = ours.connect(guest, Spec { to_nobody: true, ..Spec::impatient(mtu, 15, 2) });
    let before = ours.device.counters().packets.sent;
    for _ in 0..2 {
        pair.post(Request::Write { remote: pair.remote(0), payload: pair.payload(0, 8) });
    }
    pair.expect_error(Syndrome::TRANSPORT_RETRY_EXC);
    pair.expect_error(Syndrome::WR_FLUSH);
    // Three times both packets; an acknowledgement request may have been sent apart.
    let sent = ours.device.counters().packets.sent - before;
    assert!(sent >= 6, "{sent} packets");
}

fn rnr_exceeded(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut pair = ours.connect(guest, Spec { rnr_retry: 2, ..Spec::new(mtu) });
    let before = ours.device.counters().packets.sent;
    pair.post(Request::Send { payload: pair.payload(0, 8) });
    pair.expect_error(Syndrome::RNR_RETRY_EXC);
    let sent = ours.device.counters().packets.sent - before;
    assert!(sent >= 3, "the SEND and two more tries, not {sent} packets");
}
