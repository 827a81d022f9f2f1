//! Both directions while much of what our device sends is lost, doubled, damaged or late.
//!
//! Linux must drop what is damaged, ask for what is missing and answer what it has seen before; our device
//! must answer what Linux sends again because an answer was lost. Nothing may be carried out twice.

use ibex_abi::wqe::{AtomicOp, Request};
use ibex_hca::emulated::switch::{Fault, FaultPlan, FaultRule};

use super::guest::{Guest, pattern, status};
use super::ours::{Ours, Spec};
use super::requester::Check;
use super::responder;

/// Messages of each kind.
const MESSAGES: u64 = 48;
/// Bytes of each; no multiple of anything.
const LEN: usize = 5003;

/// What our device suffers from.
pub(crate) fn plan() -> FaultPlan {
    let faults = [
        Fault::Drop { ppm: 40_000 },
        Fault::Duplicate { ppm: 60_000 },
        Fault::Corrupt { ppm: 40_000 },
        Fault::Reorder { ppm: 40_000, overtake_max: 3, hold_us: 3000 },
    ];
    FaultPlan { seed: 1, rules: faults.map(FaultRule::always).to_vec() }
}

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("our writes and atomics happen once, whatever is lost", ours_are_lost),
    ("our reads bring the right bytes, whatever is lost", our_reads_are_lost),
    ("Linux' requests happen once, whatever answers are lost", answers_are_lost),
];

fn ours_are_lost(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let (gaps, repeats) = (guest.counter("out_of_seq_request"), guest.counter("duplicate_request"));
    let mut pair = ours.connect(guest, Spec::new(mtu));
    for nth in 0..MESSAGES {
        let offset = 4096 + nth * LEN as u64;
        pair.fill(offset, LEN, nth);
        pair.post(Request::Write { remote: pair.remote(offset), payload: pair.payload(offset, LEN) });
        pair.expect_good();
        let (op, result) = (AtomicOp::FetchAdd { add: 1 }, pair.data(64, 8));
        pair.post(Request::Atomic { remote: pair.remote(8), op, result });
        pair.expect_good();
        assert_eq!(pair.word(64), nth, "added once each");
    }
    for nth in 0..MESSAGES {
        let offset = 4096 + nth * LEN as u64;
        assert_eq!(guest.differs(pair.guest_memory, offset, LEN as u64, nth), 0, "write {nth}");
    }
    assert!(guest.counter("out_of_seq_request") > gaps, "Linux missed none");
    assert!(guest.counter("duplicate_request") > repeats, "Linux saw none twice");
    let faults = ours.device.fabric().fault_counts().expect("there is a switch");
    assert!(faults.dropped > 0 && faults.duplicated > 0 && faults.corrupted > 0 && faults.reordered > 0);
}

fn our_reads_are_lost(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let mut pair = ours.connect(guest, Spec::new(mtu));
    for nth in 0..MESSAGES {
        guest.fill(pair.guest_memory, 0, LEN as u64, nth);
        pair.post(Request::Read { remote: pair.remote(0), scatter: vec![pair.data(0, LEN)] });
        pair.expect_good();
        assert!(pair.get(0, LEN) == pattern(LEN, nth), "read {nth}");
    }
}

fn answers_are_lost(guest: &mut Guest, ours: &Ours, mtu: u32) {
    let repeats = ours.device.counters().duplicates;
    let pair = ours.connect(guest, Spec::new(mtu));
    for nth in 0..MESSAGES {
        let offset = 4096 + nth * LEN as u64;
        guest.fill(pair.guest_memory, offset, LEN as u64, nth);
        pair.guest_posts(guest, "write", &format!("{offset} {LEN} {}", pair.target(offset)));
        pair.expect_status(guest, status::SUCCESS);
        assert!(pair.get(offset, LEN) == pattern(LEN, nth), "write {nth}");
        assert_eq!(responder::atomic(guest, &pair, "fetch_add", "1"), nth, "added once each");
        let into = 4096 + MESSAGES * LEN as u64;
        pair.guest_posts(guest, "read", &format!("{into} {LEN} {}", pair.target(offset)));
        pair.expect_status(guest, status::SUCCESS);
        assert_eq!(guest.differs(pair.guest_memory, into, LEN as u64, nth), 0, "read {nth}");
    }
    assert_eq!(pair.word(8), MESSAGES);
    assert!(ours.device.counters().duplicates > repeats, "Linux sent nothing again");
}
