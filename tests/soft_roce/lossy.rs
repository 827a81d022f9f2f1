//! Both directions while much of what one end sends is lost, doubled, damaged or late.
//!
//! The other end must drop what is damaged, ask for what is missing and answer what it has seen before; the
//! end that suffers must send again what got lost. Nothing may be carried out twice.

use ibex_abi::wqe::{AtomicOp, Request};
use ibex_hca::emulated::switch::{Fault, FaultCounts, FaultPlan, FaultRule};

use super::guest::{Guest, pattern, status};
use super::link::Link;
use super::ours::{Ours, Spec};
use super::responder;

const MTU: u32 = 1024;
/// Messages of each kind.
const MESSAGES: u64 = 24;
/// Bytes of each; no multiple of anything.
const LEN: usize = 5003;

/// What packets suffer from.
pub(crate) fn plan() -> FaultPlan {
    let faults = [
        Fault::Drop { ppm: 40_000 },
        Fault::Duplicate { ppm: 60_000 },
        Fault::Corrupt { ppm: 40_000 },
        Fault::Reorder { ppm: 40_000, overtake_max: 3, hold_us: 3000 },
    ];
    FaultPlan { seed: 1, rules: faults.map(FaultRule::always).to_vec() }
}

/// Our device's packets suffer: Linux must cope.
pub(crate) fn ours_suffer(guest: &mut Guest, ours: &Ours) {
    let (gaps, repeats) = (guest.counter("out_of_seq_request"), guest.counter("duplicate_request"));
    talk(guest, ours);
    assert!(guest.counter("out_of_seq_request") > gaps, "Linux missed none");
    assert!(guest.counter("duplicate_request") > repeats, "Linux saw none twice");
    expect_all_kinds(&ours.device.fabric().fault_counts().expect("there is a switch"));
}

/// Linux' packets suffer: our device must cope.
pub(crate) fn guests_suffer(guest: &mut Guest, ours: &Ours, link: &Link) {
    let (before, naks) = (ours.device.counters(), guest.counter("rcvd_seq_err"));
    link.suffer(plan());
    talk(guest, ours);
    let (faults, after) = (link.heal(), ours.device.counters());
    expect_all_kinds(&faults);
    assert!(after.packets.bad_icrc > before.packets.bad_icrc, "no damaged packet was dropped");
    assert!(after.duplicates > before.duplicates, "no packet came twice");
    assert!(guest.counter("rcvd_seq_err") > naks, "Linux heard no NAK 0x60");
    assert!(after.packets.sent_again > before.packets.sent_again, "no answer was missed");
}

fn expect_all_kinds(faults: &FaultCounts) {
    let FaultCounts { dropped, duplicated, corrupted, reordered, .. } = *faults;
    assert!(dropped > 0 && duplicated > 0 && corrupted > 0 && reordered > 0, "{faults:?}");
}

/// An eighth of a second until something is sent again, one until all is given up.
fn lossy() -> Spec {
    Spec::impatient(MTU, 15, 7)
}

fn talk(guest: &mut Guest, ours: &Ours) {
    we_write_and_add(guest, ours);
    we_read(guest, ours);
    linux_asks(guest, ours);
}

fn we_write_and_add(guest: &mut Guest, ours: &Ours) {
    let mut pair = ours.connect(guest, lossy());
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
}

fn we_read(guest: &mut Guest, ours: &Ours) {
    let mut pair = ours.connect(guest, lossy());
    for nth in 0..MESSAGES {
        guest.fill(pair.guest_memory, 0, LEN as u64, nth);
        pair.post(Request::Read { remote: pair.remote(0), scatter: vec![pair.data(0, LEN)] });
        pair.expect_good();
        assert!(pair.get(0, LEN) == pattern(LEN, nth), "read {nth}");
    }
}

fn linux_asks(guest: &mut Guest, ours: &Ours) {
    let pair = ours.connect(guest, lossy());
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
}
