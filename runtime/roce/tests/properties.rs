//! Random messages through a channel that loses, doubles, delays and damages packets.
//!
//! Whatever the channel does: each message completes once and in order, each of its packets takes effect
//! once and in order, and READs and atomics bring back what was there.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message of a test")]

mod rig;

use ibex_roce::requester::{Event, Failure, MessageId, Operation};
use ibex_roce::{AtomicOp, Mtu, Nanos, RemoteAddr};
use proptest::prelude::*;
use rig::{Effect, End, Faults, Pair, Shape, effects_of, pattern, range};

/// Longest message: a few packets.
const MESSAGE_LEN: u32 = 1100;

fn operation() -> impl Strategy<Value = Operation> {
    let len =
        prop_oneof![0..MESSAGE_LEN, prop::sample::select(vec![0, 1, 255, 256, 257, 512, 768, 1023, 1024])];
    let imm = prop::option::weighted(0.3, any::<u32>());
    let kinds = (0..7_u8, len, imm, any::<bool>(), any::<u64>());
    kinds.prop_map(|(kind, len, imm, solicited, number)| match kind {
        0..=2 => {
            let room = u64::from(rig::WRITABLE - len);
            let to = range(rig::WRITE_BASE + number % (room + 1), len);
            Operation::Write { to, imm, solicited: solicited && imm.is_some() }
        }
        3 => Operation::Send { len, imm, solicited },
        4 => {
            let room = u64::from(rig::READ_ONLY - len);
            Operation::Read { from: range(rig::BASE + number % (room + 1), len) }
        }
        _ => {
            let va = rig::WORD_BASE + number % u64::from(rig::WORDS / 8) * 8;
            let op = match solicited {
                true => AtomicOp::FetchAdd { add: number | 1 },
                false => AtomicOp::CmpSwap { swap: number, compare: 0 },
            };
            Operation::Atomic { on: RemoteAddr { va, rkey: rig::RKEY }, op }
        }
    })
}

fn messages() -> impl Strategy<Value = [Vec<Operation>; 2]> {
    let list = || prop::collection::vec(operation(), 0..24);
    (list(), list()).prop_map(|(a, b)| [a, b])
}

fn shape() -> impl Strategy<Value = Shape> {
    let psn = prop_oneof![Just(0xff_fff8), Just(0x7f_fff8), 0_u32..1 << 24];
    // Shorter than a round trip, longer, or none; the ack timeout is 262 us.
    let early = prop_oneof![Just(None), (0..100_000_u64).prop_map(|nanos| Some(Nanos(nanos)))];
    let numbers = (psn, 1..40_u32, 1..12_u32, 1..4_u8);
    (numbers, any::<bool>(), early).prop_map(|((psn, window, every, reads), wide, first_timeout)| Shape {
        mtu: if wide { Mtu::B512 } else { Mtu::B256 },
        first_psn: psn,
        window,
        ack_every: every,
        max_reads: reads,
        first_timeout,
        ..Shape::default()
    })
}

fn faults() -> impl Strategy<Value = Faults> {
    let rate = || prop_oneof![Just(0), 0..150_000_u32];
    (rate(), rate(), rate(), rate()).prop_map(|(drop, double, delay, corrupt)| Faults {
        drop,
        double,
        delay: 3 * delay,
        corrupt,
        cut: None,
    })
}

/// Everything that must hold after all messages have completed.
fn check_all(from: &End, to: &End, messages: &[Operation], mtu: Mtu) {
    let completed = |id| Event::Completed { id: MessageId(id) };
    let expected: Vec<Event> = (0..messages.len() as u64).map(completed).collect();
    assert_eq!(from.events, expected, "each message completes once, in order");
    let effects: Vec<Effect> = effects_of(messages, mtu).concat();
    assert_eq!(to.memory.effects, effects, "each packet takes effect once, in order");
    check_responses(from, messages, messages.len(), &effects);
    assert_eq!(to.responder.msn().get() as usize, messages.len());
    assert_eq!(from.requester.next_psn(), to.responder.expected_psn());
}

/// What the first `completed` messages brought back.
fn check_responses(from: &End, messages: &[Operation], completed: usize, effects: &[Effect]) {
    let mut originals = effects.iter().filter_map(|effect| match effect {
        Effect::Atomic { original, .. } => Some(*original),
        _ => None,
    });
    for (id, op) in messages.iter().enumerate().take(completed) {
        match op {
            Operation::Read { from: range } if range.len != 0 => {
                let start = range.addr.va - rig::BASE;
                let there: Vec<u8> = (start..start + u64::from(range.len)).map(|i| pattern(i, 0)).collect();
                assert_eq!(from.local.placed[&(id as u64)], there, "message {id}");
            }
            Operation::Atomic { .. } => {
                assert_eq!(from.local.originals[&(id as u64)], originals.next().unwrap(), "message {id}");
            }
            _ => assert!(!from.local.placed.contains_key(&(id as u64)), "message {id}"),
        }
    }
}

/// Everything that must hold when messages may fail: the completed ones took effect, then comes one that
/// failed, then flushed ones; and what took effect is a prefix of what was asked for.
fn check_prefix(from: &End, to: &End, messages: &[Operation], mtu: Mtu, reason: Failure) {
    let is_completed = |event: &&Event| matches!(event, Event::Completed { .. });
    let completed = from.events.iter().take_while(is_completed).count();
    for (at, event) in from.events.iter().enumerate() {
        let id = MessageId(at as u64);
        let expected = match at {
            _ if at < completed => Event::Completed { id },
            _ if at == completed => Event::Failed { id, reason },
            _ => Event::Flushed { id },
        };
        assert_eq!(*event, expected);
    }
    let by_message = effects_of(messages, mtu);
    let certain: usize = by_message[..completed].iter().map(Vec::len).sum();
    let possible = by_message.concat();
    let done = to.memory.effects.len();
    assert!((certain..=possible.len()).contains(&done), "{done} effects, {certain} are certain");
    assert_eq!(to.memory.effects, possible[..done]);
    check_responses(from, messages, completed, &possible);
}

/// A channel that did no harm would prove nothing.
#[test]
fn the_channel_does_every_harm_that_is_asked_of_it() {
    let faults = Faults { drop: 50_000, double: 50_000, delay: 200_000, corrupt: 50_000, cut: None };
    let write = Operation::Write { to: range(rig::WRITE_BASE, 1000), imm: Some(1), solicited: false };
    let read = Operation::Read { from: range(rig::BASE, 1000) };
    let messages = [write, read, write, read].repeat(50);
    // Receives are scarce.
    let shape = Shape { receive_every: 400_000, ..Shape::default() };
    let mut pair = Pair::new(shape, faults, 1, [messages.clone(), messages.clone()]);
    pair.run();
    let [a, b] = &pair.ends;
    check_all(a, b, &messages, Mtu::B256);
    check_all(b, a, &messages, Mtu::B256);
    let seen = a.requester.counters();
    println!("{seen:?}, {} damaged", pair.num_damaged);
    let harms = [seen.sent_again, seen.timeouts, seen.sequence_naks, seen.implied_naks, seen.not_ready];
    assert!(harms.iter().all(|harm| *harm >= 10) && pair.num_damaged >= 10, "{seen:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn every_message_completes_once_and_in_order(
        messages in messages(), shape in shape(), faults in faults(), seed: u64,
    ) {
        let mut pair = Pair::new(shape, faults, seed, messages.clone());
        pair.run();
        let [a, b] = &pair.ends;
        check_all(a, b, &messages[0], shape.mtu);
        check_all(b, a, &messages[1], shape.mtu);
    }

    #[test]
    fn a_cut_channel_fails_messages_in_order_and_half_done_work_is_a_prefix(
        messages in messages(), shape in shape(), faults in faults(), seed: u64,
        from in 0..400_000_u64, retries in 0..3_u8,
    ) {
        let shape = Shape { retry_count: retries, ..shape };
        let faults = Faults { cut: Some((from, u64::MAX)), ..faults };
        let mut pair = Pair::new(shape, faults, seed, messages.clone());
        pair.run();
        let [a, b] = &pair.ends;
        check_prefix(a, b, &messages[0], shape.mtu, Failure::RetryExceeded);
        check_prefix(b, a, &messages[1], shape.mtu, Failure::RetryExceeded);
    }

    #[test]
    fn a_channel_that_is_cut_for_a_while_recovers(
        messages in messages(), shape in shape(), faults in faults(), seed: u64,
        from in 0..400_000_u64, len in 0..3_000_000_u64,
    ) {
        let faults = Faults { cut: Some((from, from + len)), ..faults };
        let mut pair = Pair::new(shape, faults, seed, messages.clone());
        pair.run();
        let [a, b] = &pair.ends;
        check_all(a, b, &messages[0], shape.mtu);
        check_all(b, a, &messages[1], shape.mtu);
    }
}
