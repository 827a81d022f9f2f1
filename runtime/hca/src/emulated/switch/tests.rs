//! What the switch does to frames, rule by rule.

use super::*;

const LATENCY: u64 = 1_000;
const US: u64 = 1_000;

fn switch(rules: &[FaultRule]) -> Switch {
    Switch::new(FaultPlan { seed: 9, rules: rules.to_vec() }, Nanos(LATENCY)).unwrap()
}

fn always(fault: Fault) -> Switch {
    switch(&[FaultRule::always(fault)])
}

/// Everything that arrives at `dst` until nothing is in flight: instant, first byte.
fn drain(switch: &mut Switch, dst: u16) -> Vec<(u64, u8)> {
    let mut arrived = Vec::new();
    while let Some(at) = switch.next_deadline(dst) {
        while let Some(delivery) = switch.poll(at, dst) {
            arrived.push((at.0, delivery.frame[0]));
            switch.give_back(delivery.frame);
        }
    }
    arrived
}

fn submit_all(switch: &mut Switch, now: u64, frames: std::ops::Range<u8>) {
    frames.for_each(|byte| switch.submit(Nanos(now), 0, 1, &[byte; 100]));
}

#[test]
fn without_rules_frames_arrive_in_order_after_the_latency() {
    let mut switch = switch(&[]);
    submit_all(&mut switch, 500, 0..3);
    assert_eq!(switch.poll(Nanos(1499), 1), None);
    assert_eq!(switch.poll(Nanos(1500), 0), None, "not the receiver");
    assert_eq!(drain(&mut switch, 1), [(1500, 0), (1500, 1), (1500, 2)]);
    let counts = FaultCounts { submitted: 3, delivered: 3, ..FaultCounts::default() };
    assert_eq!(*switch.counts(), counts);
}

#[test]
fn each_certain_fault_does_what_it_says_and_is_counted() {
    let ppm = PPM_MAX;
    let lost = |fault, count: fn(&FaultCounts) -> u64| {
        let mut switch = always(fault);
        submit_all(&mut switch, 0, 0..5);
        assert_eq!(drain(&mut switch, 1), [], "{fault:?}");
        assert_eq!((count(switch.counts()), switch.counts().delivered), (5, 0), "{fault:?}");
    };
    lost(Fault::Drop { ppm }, |counts| counts.dropped);
    lost(Fault::Partition, |counts| counts.partitioned);

    let mut twice = always(Fault::Duplicate { ppm });
    submit_all(&mut twice, 0, 0..2);
    assert_eq!(drain(&mut twice, 1), [(1000, 0), (1000, 0), (1000, 1), (1000, 1)]);
    assert_eq!(twice.counts().duplicated, 2);

    let mut late = always(Fault::Delay { ppm, min_us: 5, max_us: 5 });
    submit_all(&mut late, 0, 0..2);
    assert_eq!(drain(&mut late, 1), [(6000, 0), (6000, 1)]);
    assert_eq!(late.counts().delayed, 2);

    let mut damaged = always(Fault::Corrupt { ppm });
    damaged.submit(Nanos(0), 0, 1, &[0; 64]);
    let frame = damaged.poll(Nanos(LATENCY), 1).unwrap().frame;
    let flipped: u32 = frame.iter().map(|byte| byte.count_ones()).sum();
    assert!((1..=3).contains(&flipped), "{flipped} bits");
    assert_eq!(damaged.counts().corrupted, 1);
}

#[test]
fn a_delay_keeps_the_order_of_its_path() {
    let mut switch = always(Fault::Delay { ppm: PPM_MAX / 2, min_us: 1, max_us: 90 });
    (0..100).for_each(|nth: u8| switch.submit(Nanos(u64::from(nth) * US), 0, 1, &[nth]));
    let arrived = drain(&mut switch, 1);
    assert!(arrived.windows(2).all(|pair| pair[0] < pair[1] || pair[0].1 + 1 == pair[1].1), "{arrived:?}");
    assert!((20..80).contains(&switch.counts().delayed));
}

#[test]
fn a_reordered_frame_is_overtaken_or_comes_after_its_time() {
    let first_us = Some(1);
    let reorder = Fault::Reorder { ppm: PPM_MAX, overtake_max: 1, hold_us: 50 };
    let rule = FaultRule { to_us: first_us, ..FaultRule::always(reorder) };
    let mut overtaken = switch(&[rule]);
    submit_all(&mut overtaken, 0, 0..1);
    submit_all(&mut overtaken, 2 * US, 1..3);
    assert_eq!(drain(&mut overtaken, 1), [(3000, 1), (3000, 0), (3000, 2)]);
    let mut alone = switch(&[rule]);
    submit_all(&mut alone, 0, 0..1);
    assert_eq!(drain(&mut alone, 1), [(51_000, 0)]);
    assert_eq!((alone.counts().reordered, overtaken.counts().reordered), (1, 1));
}

#[test]
fn a_rate_limit_spaces_frames_and_loses_what_does_not_fit() {
    // 100 bytes take 100 us; 250 bytes may wait.
    let mut switch = always(Fault::RateLimit { bytes_per_s: 1_000_000, queue_bytes: 250 });
    submit_all(&mut switch, 0, 0..5);
    assert_eq!(drain(&mut switch, 1), [(101_000, 0), (201_000, 1), (301_000, 2)]);
    assert_eq!((switch.counts().paced, switch.counts().overflowed), (2, 2));
    // Each path has its own link.
    switch.submit(Nanos(0), 1, 0, &[7; 100]);
    assert_eq!(drain(&mut switch, 0), [(101_000, 7)]);
}

#[test]
fn a_link_flaps_between_up_and_down() {
    let mut switch = switch(&[FaultRule {
        from_us: 100,
        to_us: Some(130),
        ..FaultRule::always(Fault::Flap { up_us: 10, down_us: 5 })
    }]);
    let arrives = |switch: &mut Switch, us: u64| {
        switch.submit(Nanos(us * US), 0, 1, &[0]);
        !drain(switch, 1).is_empty()
    };
    for (us, expected) in [
        (99, true),
        (100, true),
        (109, true),
        (110, false),
        (114, false),
        (115, true),
        (126, false),
        (131, true),
    ] {
        assert_eq!(arrives(&mut switch, us), expected, "at {us} us");
    }
    assert_eq!(switch.counts().flapped, 3);
}

#[test]
fn a_partition_may_be_one_way() {
    let partition = FaultRule { src: Some(0), dst: Some(1), ..FaultRule::always(Fault::Partition) };
    let mut switch = switch(&[partition]);
    switch.submit(Nanos(0), 0, 1, &[1]);
    switch.submit(Nanos(0), 1, 0, &[2]);
    assert_eq!((drain(&mut switch, 1), drain(&mut switch, 0)), (vec![], vec![(1000, 2)]));
}

#[test]
fn a_seed_replays_exactly_and_seeds_differ() {
    let run = |seed| {
        let ppm = 200_000;
        let rules = [
            Fault::Drop { ppm },
            Fault::Duplicate { ppm },
            Fault::Reorder { ppm, overtake_max: 4, hold_us: 9 },
            Fault::Delay { ppm, min_us: 1, max_us: 30 },
        ];
        let plan = FaultPlan { seed, rules: rules.map(FaultRule::always).to_vec() };
        let mut switch = Switch::new(plan, Nanos(LATENCY)).unwrap();
        submit_all(&mut switch, 0, 0..200);
        (drain(&mut switch, 1), *switch.counts())
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    let (arrived, counts) = run(3);
    assert_eq!(arrived.len() as u64, counts.submitted - counts.dropped + counts.duplicated);
}

#[test]
fn frames_in_flight_are_bounded() {
    let mut switch = switch(&[]);
    (0..=IN_FLIGHT_MAX).for_each(|_| switch.submit(Nanos(0), 0, 1, &[1]));
    assert_eq!(switch.counts().crowded_out, 1);
    assert_eq!(drain(&mut switch, 1).len(), IN_FLIGHT_MAX);
}
