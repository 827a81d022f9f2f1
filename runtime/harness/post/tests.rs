//! The rig is right, and sees what is wrong.

use super::*;

fn case() -> PostCase {
    PostCase { bytes: 1000, inline: false, num_qps: 3, slots: 100, batch: 8, sq_depth_log: 5 }
}

#[test]
fn every_wqe_arrives_through_a_queue_smaller_than_a_round() {
    for link in [Link::Roce, Link::Ib] {
        let mut rig = PostRig::new(case(), link, 1).unwrap();
        for _ in 0..3 {
            let round = rig.round().unwrap();
            assert_eq!((round.completed, round.wrong), (300, 0));
        }
        assert_eq!(rig.unrung_wqes(), 0);
    }
}

#[test]
fn inline_messages_carry_their_index() {
    let case = PostCase { bytes: INLINE_LEN, inline: true, slots: 5000, ..case() };
    let mut rig = PostRig::new(case, Link::Roce, 1).unwrap();
    let round = rig.round().unwrap();
    assert_eq!((round.completed, round.wrong), (15_000, 0));
}

#[test]
fn more_than_2_to_the_16_wqes_wrap_every_counter() {
    let case = PostCase { bytes: 4, num_qps: 1, slots: 70_000, batch: 32, ..case() };
    let mut rig = PostRig::new(case, Link::Roce, 1).unwrap();
    let round = rig.round().unwrap();
    assert_eq!((round.completed, round.wrong), (70_000, 0));
}

#[test]
fn seeds_send_other_bytes() {
    let sent = |seed| PostRig::new(case(), Link::Roce, seed).unwrap().messages();
    assert!(sent(1) == sent(1) && sent(1) != sent(2) && sent(1) != sent(1 << 32));
}

#[test]
fn a_queue_of_one_wqe_is_a_ping_pong() {
    let case = PostCase { num_qps: 1, batch: 1, sq_depth_log: 0, slots: 50, ..case() };
    let mut rig = PostRig::new(case, Link::Roce, 1).unwrap();
    assert_eq!(rig.round().unwrap().wrong, 0);
}

#[test]
fn a_wrong_byte_is_counted() {
    let mut rig = PostRig::new(case(), Link::Roce, 1).unwrap();
    rig.round().unwrap();
    let messages = rig.messages();
    rig.gpu.fill(rig.target.addr() + 999, 0, 1).unwrap();
    rig.gpu.fill(rig.target.addr() + rig.case.source_len() + 5 * 1008, 0, 2 * 1008).unwrap();
    let wrong: u64 = (0..3).map(|queue| rig.count_wrong(queue, &messages).unwrap()).sum();
    assert_eq!(wrong, 3);
}

#[test]
fn cases_outside_their_limits_are_refused() {
    let refused = |change: fn(&mut PostCase)| {
        let mut case = case();
        change(&mut case);
        case.validate().unwrap_err().field
    };
    assert_eq!(refused(|case| case.bytes = 0), "bytes");
    assert_eq!(refused(|case| case.bytes = BYTES_MAX + 1), "bytes");
    assert_eq!(refused(|case| case.inline = true), "bytes");
    assert_eq!(refused(|case| case.num_qps = 0), "num_qps");
    assert_eq!(refused(|case| case.num_qps = NUM_QPS_MAX + 1), "num_qps");
    assert_eq!(refused(|case| case.slots = 0), "slots");
    assert_eq!(refused(|case| case.batch = 33), "batch");
    assert_eq!(refused(|case| (case.batch, case.sq_depth_log) = (8, 2)), "batch");
    assert_eq!(refused(|case| case.sq_depth_log = 16), "sq_depth_log");
}
