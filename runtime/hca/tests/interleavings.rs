//! Any legal interleaving of a list of operations ends in the same memory, and completes each signalled
//! one exactly once, in order.
//!
//! The oracle is two flat arrays to which the operations are applied one after the other. The device is
//! stepped piece by piece in an order that a seed chooses, with paths cut and healed on the way.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use std::collections::VecDeque;

use ibex_abi::wqe::{AtomicOp, CqUpdate, CtrlFlags, FenceMode, Request};
use ibex_hca::emulated::{PathState, Placement};
use ibex_hca::host_qp::ConnectSpec;
use ibex_hca::host_qp::CqShape;
use proptest::prelude::*;
use rig::{Random, Rig, Setup, gather, inline, write};

/// Bytes of each side that operations touch.
const AREA: usize = 16 << 10;

#[derive(Debug, Clone)]
enum Op {
    Write { from: usize, to: usize, len: usize },
    Inline { to: usize, bytes: Vec<u8> },
    Read { from: usize, to: usize, len: usize },
    FetchAdd { word: usize, result: usize, add: u64 },
    CmpSwap { word: usize, result: usize, swap: u64, compare: u64 },
    Nop,
}

#[derive(Debug, Clone)]
struct Posted {
    op: Op,
    signaled: bool,
}

fn range(len_max: usize) -> impl Strategy<Value = (usize, usize, usize)> {
    (1..=len_max).prop_flat_map(|len| (0..=AREA - len, 0..=AREA - len, Just(len)))
}

fn any_op() -> impl Strategy<Value = Op> {
    let word = || (0..AREA / 8).prop_map(|word| word * 8);
    prop_oneof![
        4 => range(10_000).prop_map(|(from, to, len)| Op::Write { from, to, len }),
        4 => range(200).prop_flat_map(|(_, to, len)| {
            prop::collection::vec(any::<u8>(), len).prop_map(move |bytes| Op::Inline { to, bytes })
        }),
        2 => range(10_000).prop_map(|(from, to, len)| Op::Read { from, to, len }),
        1 => (word(), word(), any::<u64>())
            .prop_map(|(word, result, add)| Op::FetchAdd { word, result, add }),
        1 => (word(), word(), any::<u64>(), 0..3_u64).prop_map(|(word, result, swap, compare)| {
            Op::CmpSwap { word, result, swap, compare }
        }),
        1 => Just(Op::Nop),
    ]
}

fn any_list() -> impl Strategy<Value = Vec<Posted>> {
    let posted = (any_op(), any::<bool>()).prop_map(|(op, signaled)| Posted { op, signaled });
    prop::collection::vec(posted, 1..40)
}

/// Local and remote memory, as the operations one after the other leave them.
struct Model {
    local: Vec<u8>,
    remote: Vec<u8>,
}

impl Model {
    fn apply(&mut self, op: &Op) {
        let Self { local, remote } = self;
        match op {
            Op::Write { from, to, len } => {
                remote[*to..to + len].copy_from_slice(&local[*from..from + len]);
            }
            Op::Inline { to, bytes } => remote[*to..to + bytes.len()].copy_from_slice(bytes),
            Op::Read { from, to, len } => {
                local[*to..to + len].copy_from_slice(&remote[*from..from + len]);
            }
            Op::FetchAdd { word, result, add } => {
                Self::atomic(local, remote, *word, *result, |old| old.wrapping_add(*add));
            }
            Op::CmpSwap { word, result, swap, compare } => {
                let change = |old| if old == *compare { *swap } else { old };
                Self::atomic(local, remote, *word, *result, change);
            }
            Op::Nop => {}
        }
    }

    fn atomic(local: &mut [u8], remote: &mut [u8], word: usize, result: usize, f: impl Fn(u64) -> u64) {
        let old = u64::from_le_bytes(remote[word..word + 8].try_into().unwrap());
        remote[word..word + 8].copy_from_slice(&f(old).to_le_bytes());
        local[result..result + 8].copy_from_slice(&old.to_le_bytes());
    }
}

fn request(rig: &Rig, op: &Op) -> Request {
    let [near, far] = &rig.ends;
    let data = |at: usize, len: usize| near.data(at as u64, len as u32);
    match op {
        Op::Write { from, to, len } => {
            // Two segments, so that chunks and segments do not line up.
            let (one, other) = (len / 3, len - len / 3);
            let mut list = vec![data(from + one, other)];
            if one != 0 {
                list.insert(0, data(*from, one));
            }
            write(far.remote(*to as u64), gather(&list))
        }
        Op::Inline { to, bytes } => write(far.remote(*to as u64), inline(bytes)),
        Op::Read { from, to, len } => {
            Request::Read { remote: far.remote(*from as u64), scatter: vec![data(*to, *len)] }
        }
        Op::FetchAdd { word, result, add } => Request::Atomic {
            remote: far.remote(*word as u64),
            op: AtomicOp::FetchAdd { add: *add },
            result: data(*result, 8),
        },
        Op::CmpSwap { word, result, swap, compare } => Request::Atomic {
            remote: far.remote(*word as u64),
            op: AtomicOp::CmpSwap { swap: *swap, compare: *compare },
            result: data(*result, 8),
        },
        Op::Nop => Request::Nop { body: Vec::new() },
    }
}

fn setup(placement: Placement) -> Setup {
    let mut setup = Setup { placement, ..Setup::default() };
    setup.qp.log_sq_size = 5;
    setup.qp.send_cq = CqShape::Ring { log_size: 6, overrun_ignore: false };
    setup.connect = ConnectSpec {
        retry_count: 7,
        ack_timeout: 8,
        mtu: ibex_abi::types::PathMtu::B1024,
        ..ConnectSpec::default()
    };
    setup
}

/// Posts what fits; gives the indices of signalled requests.
fn post(rig: &mut Rig, pending: &mut VecDeque<Posted>, fence_all: bool, expected: &mut Vec<u16>) {
    let mut requests = Vec::new();
    for posted in pending.iter() {
        requests.push((request(rig, &posted.op), posted.signaled));
    }
    let mut batch = rig.ends[0].qp.batch();
    for (nth, (request, signaled)) in requests.into_iter().enumerate() {
        let last = nth + 1 == pending.len();
        let update = if signaled || last { CqUpdate::Always } else { CqUpdate::OnError };
        // Reads and atomics are ordered with what follows only by fences.
        let fence = if fence_all { FenceMode::StrongOrdering } else { FenceMode::SmallAndFence };
        match batch.push(CtrlFlags::new(fence, update, false), request) {
            Ok(idx) if update == CqUpdate::Always => expected.push(idx),
            Ok(_) => {}
            Err(_) => {
                // The queue is full: what was pushed goes out, and its last request must be seen
                // to complete, so that there is room again.
                batch.commit().ring();
                pending.drain(..nth);
                return;
            }
        }
    }
    batch.commit().ring();
    pending.clear();
}

/// Runs the list in an order that `seed` chooses and checks memory and completions.
fn run(list: &[Posted], seed: u64, placement: Placement, cuts: bool) {
    let mut rig = rig::rig(setup(placement));
    let mut random = Random(seed);
    let fill: Vec<u8> = (0..AREA).map(|_| random.below(256).to_le_bytes()[0]).collect();
    let mut model = Model { local: fill.clone(), remote: vec![0; AREA] };
    rig.ends[0].put(0, &fill);
    list.iter().for_each(|posted| model.apply(&posted.op));

    // With writes placed in any order, only a strong fence makes the result of overlapping ones one.
    let fence_all = placement == Placement::WritesAnyOrder;
    // A queue that is full must drain, so every request is signalled where the list might not fit.
    let mut pending: VecDeque<_> = list.iter().cloned().map(|p| Posted { signaled: true, ..p }).collect();
    if list.len() < 8 {
        pending = list.iter().cloned().collect();
    }
    let (mut expected, mut seen) = (Vec::new(), Vec::new());
    let mut idle = 0;
    while idle < 2 || !pending.is_empty() || seen.len() < expected.len() {
        if !pending.is_empty() && random.below(8) == 0 {
            post(&mut rig, &mut pending, fence_all, &mut expected);
        }
        if cuts && random.below(64) == 0 {
            let [near, far] = rig.ports;
            let (src, dst) = if random.below(2) == 0 { (near, far) } else { (far, near) };
            let state = if random.below(2) == 0 { PathState::Cut } else { PathState::Up };
            rig.fabric.set_path(src, dst, state);
        }
        let end = random.below(2) as usize;
        let device = &rig.ends[end].device;
        let step = device.step_seeded(rig.now, &mut |n| random.below(n));
        idle = if step.did_work { 0 } else { idle + 1 };
        if idle > 20
            && let Some(at) = step.next_deadline
        {
            // Nothing moves: time passes, and the paths heal before patience runs out.
            rig.requests(PathState::Up);
            rig.answers(PathState::Up);
            rig.now = rig.now.max(at);
            idle = 0;
        }
        if random.below(4) == 0
            && let Some(completion) = rig.ends[0].qp.poll()
        {
            assert_eq!(completion.syndrome(), None, "seed {seed}: {completion:?}");
            seen.push(completion.wqe_counter);
        }
    }
    assert_eq!(rig.ends[0].qp.poll(), None, "seed {seed}: a completion too many");
    assert_eq!(seen, expected, "seed {seed}: completions");
    assert!(rig.ends[0].get(0, AREA as u64) == model.local, "seed {seed}: local memory");
    assert!(rig.ends[1].get(0, AREA as u64) == model.remote, "seed {seed}: remote memory");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn ordered_operations_end_in_the_same_memory(list in any_list(), seed: u64) {
        run(&list, seed, Placement::InOrder, false);
    }

    #[test]
    fn lost_requests_and_answers_change_nothing(list in any_list(), seed: u64) {
        run(&list, seed, Placement::InOrder, true);
    }

    #[test]
    fn strongly_ordered_operations_survive_any_placement(list in any_list(), seed: u64) {
        run(&list, seed, Placement::WritesAnyOrder, true);
    }
}

/// What order there is not: the test that the pieces really interleave.
#[test]
fn every_legal_order_is_reached_by_some_seed() {
    let mut signal_first = [false; 2];
    let mut halves = [[false; 2]; 2];
    for (kind, placement) in [Placement::InOrder, Placement::WritesAnyOrder].into_iter().enumerate() {
        for seed in 0..200 {
            let mut rig = rig::rig(setup(placement));
            rig.ends[0].put(0, &[1; 2048]);
            let data = gather(&[rig.ends[0].data(0, 2048)]);
            let signal = write(rig.ends[1].remote(8192), inline(&[1; 8]));
            let row = write(rig.ends[1].remote(0), data);
            let mut batch = rig.ends[0].qp.batch();
            batch.push(CtrlFlags::UNSIGNALED, row).unwrap();
            batch.push(CtrlFlags::SIGNALED, signal).unwrap();
            batch.commit().ring();
            let mut random = Random(seed);
            while rig.ends[0].device.step_seeded(rig.now, &mut |n| random.below(n)).did_work {
                let [far_row, far_signal] = [(0, 2048), (8192, 8)].map(|(at, len)| rig.ends[1].get(at, len));
                let landed = [0, 1024].map(|at: usize| far_row[at] == 1);
                if far_signal[0] == 1 && landed != [true; 2] {
                    signal_first[kind] = true;
                }
                for half in 0..2 {
                    halves[kind][half] |= landed[half] && !landed[1 - half];
                }
            }
        }
    }
    assert_eq!(halves, [[true; 2]; 2], "chunks of one message land in any order");
    assert_eq!(signal_first, [false, true], "only where the fabric may, a signal overtakes its data");
}

/// A found failure: a READ whose request was lost completed without its data.
#[test]
fn a_read_whose_request_was_lost_still_waits_for_its_data() {
    for seed in 0..300 {
        let read = Op::Read { from: 0, to: 8192, len: 3000 };
        let before = Op::Inline { to: 100, bytes: vec![7; 100] };
        let list = [before, read].map(|op| Posted { op, signaled: true });
        run(&list, seed, Placement::InOrder, true);
    }
}
