//! Losing a peer honestly: refused commands, a silent rank, a slow one, a queue pair in error.

#![expect(clippy::unwrap_used, reason = "test helpers: a failed expectation is the message")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ibex::config::{Config, RoutePolicy, WireDtype};
use ibex::error::Error;
use ibex::harness::{Rig, StepPlan};
use ibex::ids::{LocalExpertIdx, Rank};
use ibex::reference::check::{Step, Verdict};
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{DeviceWrapper, Replacement, WorldOptions};
use ibex::telemetry::FaultKind;
use ibex_abi::cqe::Syndrome;
use ibex_abi::prm::{Op, Status};
use ibex_hca::Nanos;
use ibex_hca::emulated::{EmulatedHca, ObjectKind};
use ibex_hca::fault::{Effect, Fault, FaultHca};
use parking_lot::Mutex;

const DETECT_MS: u32 = 400;
const LOST: Rank = Rank(2);

fn config() -> Config {
    Config {
        num_ranks: 3,
        max_tokens: 12,
        hidden: 128,
        num_experts: 9,
        max_topk: 3,
        channels: Some(2),
        dtype: WireDtype::Bf16,
        route: RoutePolicy::Ibgda,
        sq_depth_log: 5,
        detect_ms: DETECT_MS,
        ..Config::default()
    }
}

fn inputs(rig: &Rig, iteration: u64) -> Vec<RankInput> {
    let config = rig.config();
    let input = |rank: u32| {
        let key = InputKey { seed: 11, iteration, rank: Rank(rank as u16) };
        RankInput::generate(config, Routing::Uniform, key, config.max_tokens)
    };
    (0..config.num_ranks).map(input).collect()
}

fn whole_step(rig: &Rig, iteration: u64) {
    let verdict = rig.step(&inputs(rig, iteration), &StepPlan::default()).unwrap();
    assert_eq!((verdict.wrong, verdict.lost), (0, 0), "{verdict:?}");
}

/// Runs one step of `running` and checks it: exactly the picks of the others are lost, and said to be.
fn degraded_step(
    rig: &Rig,
    iteration: u64,
    running: &[Rank],
    alive_to: impl Fn(Rank) -> Vec<bool>,
) -> Duration {
    let plan = StepPlan::default();
    let inputs = inputs(rig, iteration);
    rig.load(&inputs, &plan).unwrap();
    let ranks = || rig.ranks().iter().filter(|rank| running.contains(&rank.rank()));
    for rank in ranks() {
        rank.wipe_outputs().unwrap();
    }
    let started = Instant::now();
    for rank in ranks() {
        rank.launch(rig.config().max_topk, &plan).unwrap();
    }
    for rank in ranks() {
        rank.session.gpu().synchronize(&rank.stream).unwrap();
    }
    let took = started.elapsed();
    let step = Step::new(rig.config(), &inputs);
    for rank in ranks() {
        let alive = alive_to(rank.rank());
        let mut verdict: Verdict = rank.check_dispatch(&step).unwrap();
        assert_eq!(source_ok(rig, rank.rank()), alive, "rank {}", rank.rank());
        verdict += rank.check_combine(&step, &inputs[rank.rank().index()], &alive).unwrap();
        assert_eq!((verdict.wrong, verdict.excess_losses), (0, 0), "rank {}: {verdict:?}", rank.rank());
        assert!(verdict.lost > 0, "somebody picked an expert of {LOST}");
    }
    took
}

fn source_ok(rig: &Rig, rank: Rank) -> Vec<bool> {
    let rank = &rig.ranks()[rank.index()];
    let word = |source: usize| {
        let addr = rank.tensors.source_ok.addr() + 4 * source as u64;
        rank.session.gpu().load_u32(addr).unwrap() == 1
    };
    (0..rig.ranks().len()).map(word).collect()
}

/// Everybody but `LOST` sees everybody but `LOST`; `LOST` sees itself.
fn without_lost(rank: Rank) -> Vec<bool> {
    (0..3).map(|other| (Rank(other) == LOST) == (rank == LOST)).collect()
}

fn faulty_rig() -> (Rig, Vec<Arc<FaultHca<EmulatedHca>>>) {
    let made = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&made);
    let devices = DeviceWrapper::new(move |_, device| {
        let faulty = FaultHca::new(device);
        keep.lock().push(Arc::clone(&faulty));
        faulty
    });
    let rig = Rig::new(&config(), &WorldOptions { devices, ..WorldOptions::default() }).unwrap();
    let devices = made.lock().clone();
    (rig, devices)
}

/// Objects by kind that exist on a device.
fn live_objects(device: &EmulatedHca) -> Vec<(String, i64)> {
    assert_eq!(device.trace_dropped(), 0);
    let mut counts = std::collections::BTreeMap::new();
    for record in device.trace().iter().filter(|r| r.status == Status::Ok) {
        let change = match record.op {
            Some(Op::CreateCq | Op::CreateQp | Op::CreateMkey | Op::AllocUar) => 1,
            Some(Op::DestroyCq | Op::DestroyQp | Op::DestroyMkey | Op::DeallocUar) => -1,
            _ => continue,
        };
        *counts.entry(format!("{:?}", record.object)).or_insert(0) += change;
    }
    assert!(counts.contains_key(&format!("{:?}", ObjectKind::Qp)));
    counts.into_iter().collect()
}

/// Loses the reply of the k-th command on one device while `LOST` is replaced. A queue pair whose name is lost stays on
/// the device, and with it the memory that it could write; all else is as after a refusal. Returns the command's kind
/// and the bytes that stay taken; none if there is no such command.
fn lose_reply(device: Rank, skip: u32) -> Option<(Op, u64)> {
    let (rig, devices) = faulty_rig();
    let faulty = &devices[device.index()];
    let bytes = || rig.ranks().iter().map(|r| r.session.control_report().live_bytes).collect::<Vec<_>>();
    whole_step(&rig, 0);
    let before = bytes();
    faulty.inject(Fault { op: None, skip, effect: Effect::LoseReply(Status::IntErr) });
    let Err(error) = rig.world().replace_peer(LOST, Replacement::default()) else { return None };
    let Error::Command(command) = &error else { panic!("command {skip}: {error:?}") };
    assert!(bytes().iter().zip(&before).all(|(now, before)| now <= before), "command {skip}");
    degraded_step(&rig, 1, &[Rank(0), Rank(1), LOST], without_lost);
    rig.world().replace_peer(LOST, Replacement::default()).unwrap();
    whole_step(&rig, 2);
    let mut expected = before;
    let kept = bytes()[device.index()] - expected[device.index()];
    expected[device.index()] += kept;
    assert_eq!(bytes(), expected, "command {skip}: {command}");
    Some((command.op()?, kept))
}

#[test]
fn any_reply_may_be_lost() {
    for (device, num_pairs) in [(Rank(0), 1), (LOST, 2)] {
        let lost: Vec<_> = (0..).map_while(|skip| lose_reply(device, skip)).collect();
        let kept_after = |op| lost.iter().filter(move |(of, kept)| *of == op && *kept != 0).count();
        for op in [Op::DestroyQp, Op::DestroyCq, Op::DestroyMkey, Op::DeallocUar, Op::ToErrQp, Op::ToRstQp] {
            assert!(lost.contains(&(op, 0)), "{op:?} of {lost:?}");
        }
        // The control queue pair's memory is in a region of its own.
        let num_kernel_driven = num_pairs * config().channels.unwrap() as usize;
        assert_eq!(kept_after(Op::CreateQp), num_kernel_driven);
        assert_eq!(lost.iter().filter(|(_, kept)| *kept != 0).count(), num_kernel_driven, "{lost:?}");
    }
}

/// Refuses the k-th command on one device while `LOST` is replaced, for every k there is.
fn refuse_every_command_on(device: Rank) {
    let (rig, devices) = faulty_rig();
    let faulty = &devices[device.index()];
    let objects = || rig.world().devices().iter().map(|d| live_objects(d)).collect::<Vec<_>>();
    let bytes = || rig.ranks().iter().map(|r| r.session.control_report().live_bytes).collect::<Vec<_>>();
    whole_step(&rig, 0);
    let (objects_before, bytes_before) = (objects(), bytes());
    let mut refused = BTreeSet::new();
    for skip in 0.. {
        faulty.inject(Fault { op: None, skip, effect: Effect::Refuse(Status::IntErr) });
        let error = match rig.world().replace_peer(LOST, Replacement::default()) {
            Ok(()) => break,
            Err(error) => error,
        };
        let Error::Command(command) = &error else { panic!("command {skip}: {error:?}") };
        refused.insert(command.opcode);
        assert!(bytes().iter().zip(&bytes_before).all(|(now, before)| now <= before), "command {skip}");
        let all = [Rank(0), Rank(1), LOST];
        let took = degraded_step(&rig, u64::from(skip), &all, without_lost);
        assert!(
            took < Duration::from_millis(DETECT_MS.into()),
            "command {skip}: nobody waits for a masked pair"
        );
        rig.world().replace_peer(LOST, Replacement::default()).unwrap();
        whole_step(&rig, u64::from(skip));
        assert_eq!(
            (objects(), bytes()),
            (objects_before.clone(), bytes_before.clone()),
            "after command {skip}"
        );
    }
    faulty.clear();
    whole_step(&rig, 99);
    let every_kind = [
        Op::CreateMkey,
        Op::DestroyMkey,
        Op::CreateCq,
        Op::DestroyCq,
        Op::CreateQp,
        Op::DestroyQp,
        Op::Rst2InitQp,
        Op::Init2RtrQp,
        Op::Rtr2RtsQp,
        Op::ToErrQp,
        Op::ToRstQp,
        Op::AllocUar,
        Op::DeallocUar,
    ];
    assert_eq!(refused, every_kind.map(Op::code).into_iter().collect(), "each was refused once");
}

#[test]
fn any_command_at_a_survivor_may_be_refused() {
    refuse_every_command_on(Rank(0));
}

#[test]
fn any_command_at_the_replaced_rank_may_be_refused() {
    refuse_every_command_on(LOST);
}

#[test]
fn what_a_refused_cleanup_leaves_is_swept_by_the_next_attempt() {
    let (rig, devices) = faulty_rig();
    let (faulty, session) = (&devices[0], rig.world().session(Rank(0)));
    let (objects, bytes) = (live_objects(faulty.inner()), session.control_report().live_bytes);
    // The fence destroys three completion queues; the fourth is that of the queue pair that cannot be made.
    let status = Status::IntErr;
    faulty.inject(Fault::refuse(Op::CreateQp, status));
    faulty.inject(Fault { skip: 3, ..Fault::refuse(Op::DestroyCq, status) });
    rig.world().replace_peer(LOST, Replacement::default()).unwrap_err();
    assert_eq!(faulty.pending(), 0, "both have struck");
    let left = session.control_report().live_blocks;
    rig.world().replace_peer(LOST, Replacement::default()).unwrap();
    assert!(left > 0);
    assert_eq!((live_objects(faulty.inner()), session.control_report().live_bytes), (objects, bytes));
    whole_step(&rig, 0);
}

#[test]
fn a_silent_rank_is_lost_in_time_and_whole_again_after_its_replacement() {
    let rig = Rig::new(&config(), &WorldOptions::default()).unwrap();
    let detect = Duration::from_millis(DETECT_MS.into());
    let stall = Duration::from_millis(rig.config().stall_ms().into());
    whole_step(&rig, 0);
    rig.world().set_silent(LOST, true);
    let survivors = [Rank(0), Rank(1)];
    let first = degraded_step(&rig, 1, &survivors, without_lost);
    assert!((detect..stall).contains(&first), "{first:?}");
    for rank in survivors {
        let session = rig.world().session(rank);
        let faults = session.faults().unwrap();
        assert!(!faults.is_empty());
        assert!(faults.iter().all(|f| (f.peer, f.kind) == (LOST, FaultKind::Silent)), "{faults:?}");
        assert_eq!(session.suspected().unwrap(), [LOST]);
    }
    for iteration in 2..7 {
        let took = degraded_step(&rig, iteration, &survivors, without_lost);
        assert!(took < detect, "a suspicion sticks: {took:?}");
    }
    rig.world().set_silent(LOST, false);
    rig.world().replace_peer(LOST, Replacement { sq_depth_log: Some(6) }).unwrap();
    for rank in rig.ranks() {
        assert!(rank.session.faults().unwrap().is_empty());
        assert!(rank.session.suspected().unwrap().is_empty());
    }
    (7..14).for_each(|iteration| whole_step(&rig, iteration));
}

#[test]
fn a_slow_rank_that_lives_is_waited_for() {
    let rig = Rig::new(&config(), &WorldOptions::default()).unwrap();
    for iteration in 0..2 {
        let plan = StepPlan::default();
        let inputs = inputs(&rig, iteration);
        rig.load(&inputs, &plan).unwrap();
        for rank in rig.ranks() {
            if rank.rank() == LOST {
                std::thread::sleep(Duration::from_millis((3 * DETECT_MS).into()));
            }
            rank.launch(rig.config().max_topk, &plan).unwrap();
        }
        rig.synchronize().unwrap();
        let verdict = rig.check(&inputs).unwrap();
        assert_eq!((verdict.wrong, verdict.lost), (0, 0), "{verdict:?}");
    }
    for rank in rig.ranks() {
        assert!(rank.session.faults().unwrap().is_empty() && rank.session.suspected().unwrap().is_empty());
    }
}

#[test]
fn a_queue_pair_in_error_is_found_within_milliseconds() {
    let config = Config { detect_ms: 2000, stall_ms: Some(2000), ..config() };
    let rig = Rig::new(&config, &WorldOptions::default()).unwrap();
    whole_step(&rig, 0);
    let (here, peer) = (Rank(0), Rank(1));
    for qpn in rig.world().session(here).queue_pairs(peer) {
        let now = Nanos(rig.world().pool().now_ns());
        assert!(rig.world().devices()[here.index()].set_qp_error(qpn, Syndrome::TRANSPORT_RETRY_EXC, now));
    }
    let plan = StepPlan::default();
    rig.load(&inputs(&rig, 1), &plan).unwrap();
    let started = Instant::now();
    for rank in rig.ranks() {
        rank.launch(rig.config().max_topk, &plan).unwrap();
    }
    let first = &rig.ranks()[here.index()];
    first.session.gpu().synchronize(&first.stream).unwrap();
    let took = started.elapsed();
    rig.synchronize().unwrap();
    let faults = first.session.faults().unwrap();
    let found: Vec<_> = faults.iter().map(|f| (f.peer, f.kind)).collect();
    assert_eq!(found, [(peer, FaultKind::Completion)]);
    assert_ne!(faults[0].syndrome, 0);
    assert!(took < Duration::from_millis(1000), "long before any deadline: {took:?}");
    rig.world().replace_peer(peer, Replacement::default()).unwrap();
    (2..5).for_each(|iteration| whole_step(&rig, iteration));
}

/// The channel that carries the counts arrives, another does not: the rows that the counts reserved stay as holes.
#[test]
fn a_source_lost_after_its_counts_arrived_leaves_holes_and_nothing_wrong() {
    let config = Config { detect_ms: 1000, stall_ms: Some(2000), ..config() };
    let rig = Rig::new(&config, &WorldOptions::default()).unwrap();
    whole_step(&rig, 0);
    let (here, peer) = (Rank(0), Rank(1));
    let second_channel = rig.world().session(here).queue_pairs(peer)[1];
    let now = Nanos(rig.world().pool().now_ns());
    let device = &rig.world().devices()[here.index()];
    assert!(device.set_qp_error(second_channel, Syndrome::TRANSPORT_RETRY_EXC, now));
    let inputs = inputs(&rig, 1);
    let verdict = rig.step(&inputs, &StepPlan::default()).unwrap();
    assert_eq!(verdict.wrong, 0, "{verdict:?}");
    assert_eq!(source_ok(&rig, peer), [false, true, true]);

    // Otherwise this would show nothing: rows are reserved beyond those of the sources that arrived.
    let step = Step::new(rig.config(), &inputs);
    let experts = (0..rig.config().max_local_experts()).map(|expert| LocalExpertIdx(expert as u16));
    let holes = experts.filter(|&expert| {
        let addr = rig.ranks()[peer.index()].tensors.expert_counts.addr() + 4 * expert.index() as u64;
        let reserved = rig.ranks()[peer.index()].session.gpu().load_u32(addr).unwrap() as usize;
        let arrived = [peer, LOST].map(|source| step.expected_rows(peer, expert, source).len());
        reserved > arrived.iter().sum()
    });
    assert!(holes.count() > 0, "no hole: {verdict:?}");
}
