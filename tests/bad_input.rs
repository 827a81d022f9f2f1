//! Input that is refused, with field, value and limit and without a trace; input that is odd but valid; sizes.

#![expect(clippy::unwrap_used, reason = "test helpers: a failed expectation is the message")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ibex::config::{CombineMode, Config, RoutePolicy, ScaleKind, WireDtype};
use ibex::error::{Error, Exhausted, Limit, Resource, Value};
use ibex::gpu::{Backing, DeviceMemory};
use ibex::harness::{Rig, RigRank, StepPlan};
use ibex::ids::{Lane, Rank};
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{
    CombineSource, DeviceWrapper, DispatchCall, DispatchHandle, Halves, Replacement, Tensors, Tokens, World,
    WorldOptions, buffer_bytes,
};
use ibex_hca::emulated::DeviceCounters;

fn config() -> Config {
    Config {
        num_ranks: 2,
        max_tokens: 8,
        hidden: 128,
        num_experts: 6,
        max_topk: 4,
        dtype: WireDtype::Bf16,
        route: RoutePolicy::Ibgda,
        detect_ms: 5000,
        ..Config::default()
    }
}

/// Options whose worlds count, in `made`, the devices that they hand to sessions.
fn counting(made: &Arc<AtomicU32>) -> WorldOptions {
    let made = Arc::clone(made);
    let devices = DeviceWrapper::new(move |_, device| {
        made.fetch_add(1, Ordering::Relaxed);
        device
    });
    WorldOptions { devices, ..WorldOptions::default() }
}

fn rig(config: &Config) -> Rig {
    Rig::new(config, &WorldOptions::default()).unwrap()
}

#[test]
fn every_invalid_field_of_the_configuration_is_named_with_its_limit() {
    let good = Config::default;
    let cases: Vec<(&str, Config)> = vec![
        ("num_ranks", Config { num_ranks: 0, ..good() }),
        ("num_ranks", Config { num_ranks: 513, ..good() }),
        ("max_tokens", Config { max_tokens: 0, ..good() }),
        ("max_tokens", Config { max_tokens: 65_536, ..good() }),
        ("hidden", Config { hidden: 0, ..good() }),
        ("hidden", Config { hidden: 7176, ..good() }),
        ("hidden", Config { hidden: 7172, dtype: WireDtype::Bf16, ..good() }),
        ("hidden", Config { hidden: 65_552, ..good() }),
        ("num_experts", Config { num_experts: 0, ..good() }),
        ("num_experts", Config { num_experts: 65_536, ..good() }),
        ("max_topk", Config { max_topk: 0, ..good() }),
        ("max_topk", Config { max_topk: 33, ..good() }),
        ("max_topk", Config { max_topk: 8, num_experts: 7, ..good() }),
        ("scales", Config { dtype: WireDtype::Bf16, scales: ScaleKind::Ue8m0, ..good() }),
        ("ring", Config { ring: 0, ..good() }),
        ("ring", Config { ring: 9, ..good() }),
        ("lanes", Config { lanes: 0, ..good() }),
        ("lanes", Config { lanes: 9, ..good() }),
        ("channels", Config { channels: Some(0), ..good() }),
        ("channels", Config { channels: Some(17), ..good() }),
        ("num_sms", Config { num_sms: 0, ..good() }),
        ("num_sms", Config { num_sms: 1025, ..good() }),
        ("warps_per_block", Config { warps_per_block: 1, ..good() }),
        ("warps_per_block", Config { warps_per_block: 33, ..good() }),
        ("num_owner_warps", Config { num_owner_warps: Some(0), ..good() }),
        ("num_owner_warps", Config { num_owner_warps: Some(32 * 1024), ..good() }),
        ("sq_depth_log", Config { sq_depth_log: 3, ..good() }),
        ("sq_depth_log", Config { sq_depth_log: 16, ..good() }),
        // 2 x 8 credits, a trailer, a signal and LOST leave no room for a row in 16 WQEBBs.
        ("sq_depth_log", Config { sq_depth_log: 4, ring: 8, ..good() }),
        ("staging_rows", Config { staging_rows: 0, ..good() }),
        ("staging_rows", Config { staging_rows: 65_537, ..good() }),
        ("spare_regions", Config { spare_regions: 4, ..good() }),
        ("detect_ms", Config { detect_ms: 0, ..good() }),
        ("detect_ms", Config { detect_ms: 60_001, ..good() }),
        ("stall_ms", Config { stall_ms: Some(0), ..good() }),
        ("stall_ms", Config { stall_ms: Some(99), ..good() }),
        ("stall_ms", Config { stall_ms: Some(3_600_001), ..good() }),
    ];
    let made = Arc::new(AtomicU32::new(0));
    let options = counting(&made);
    for (field, config) in cases {
        let Err(Error::Config(error)) = World::new(&config, &options) else {
            panic!("{field} was accepted in {config:?}")
        };
        assert_eq!(error.field, field, "{config:?}");
        let text = error.to_string();
        assert!(text.starts_with(&format!("{field} = {} is refused: it must be ", error.value)), "{text}");
        assert_eq!(made.load(Ordering::Relaxed), 0, "{field}: the check comes before any device");
    }
    drop(World::new(&config(), &options).unwrap());
    assert_eq!(made.load(Ordering::Relaxed), 2, "a good one makes a device per rank");
}

#[test]
fn a_grid_that_cannot_run_at_once_is_refused() {
    let Err(error) =
        World::new(&Config { num_sms: 1024, warps_per_block: 32, ..config() }, &WorldOptions::default())
    else {
        panic!("32768 warps were accepted")
    };
    let Error::Exhausted(exhausted) = error else { panic!("{error:?}") };
    let expected = Exhausted { resource: Resource::CoresidentBlocks, limit: 32, in_use: 0, requested: 1024 };
    assert_eq!(exhausted, expected);
}

/// What a refused call must leave alone.
#[derive(Debug, PartialEq)]
struct Footprint {
    counters: Vec<DeviceCounters>,
    commands: Vec<usize>,
    allocated: Vec<u64>,
    control: Vec<u64>,
    next: Vec<Vec<[u64; 2]>>,
}

impl Footprint {
    fn of(rig: &Rig) -> Self {
        let sessions = || rig.world().sessions().iter();
        // The sign of life goes on all the time and is none of the calls' doing: only errors and violations count.
        let counters = |d: &ibex_hca::emulated::DeviceCounters| DeviceCounters {
            wqes: 0,
            doorbells: 0,
            cqes: 0,
            bytes_written: 0,
            ..*d
        };
        Self {
            counters: rig.world().devices().iter().map(|d| counters(&d.counters())).collect(),
            commands: rig.world().devices().iter().map(|d| d.trace().len()).collect(),
            allocated: sessions().map(|s| s.gpu().allocated_bytes()).collect(),
            control: sessions().map(|s| s.control_report().live_bytes).collect(),
            next: sessions().map(|s| s.next_seqs().unwrap()).collect(),
        }
    }
}

/// WQEs that kernels of all ranks have posted.
fn posted(rig: &Rig) -> u64 {
    rig.world().sessions().iter().map(|s| s.telemetry().unwrap().total(|peer| peer.wqes)).sum()
}

fn refused<T>(rig: &Rig, what: &str, call: impl FnOnce() -> Result<T, Error>) -> Error {
    let (before, wqes) = (Footprint::of(rig), posted(rig));
    let Err(error) = call() else { panic!("{what} was accepted") };
    rig.synchronize().unwrap();
    assert_eq!(before, Footprint::of(rig), "{what} left something behind");
    assert_eq!(wqes, posted(rig), "{what} posted something");
    error
}

fn assert_config(error: Error, field: &str, value: impl Into<Value>, limit: Limit) {
    let Error::Config(error) = error else { panic!("{error:?}") };
    assert_eq!((error.field, error.value, error.limit), (field, value.into(), limit));
}

#[test]
fn a_refused_call_names_what_is_wrong_and_leaves_nothing_behind() {
    let rig = rig(&Config { combine: CombineMode::Reduced, ..config() });
    let RigRank { session, tensors, stream } = &rig.ranks()[0];
    let good = DispatchCall::new(4);
    let dispatch = |lane, call: DispatchCall| session.dispatch(Lane(lane), stream, tensors, &call);
    let error = refused(&rig, "lane 1 of 1", || dispatch(1, good));
    assert_config(error, "lane", 1_u32, Limit::Range { min: 0, max: 0 });
    for num_topk in [0, 5] {
        let error = refused(&rig, "top-k", || dispatch(0, DispatchCall { num_topk, ..good }));
        assert_config(error, "num_topk", num_topk, Limit::Range { min: 1, max: 4 });
    }
    let error = refused(&rig, "no weights", || dispatch(0, DispatchCall { with_weights: false, ..good }));
    assert_config(error, "topk_weights", "absent", Limit::Present { needed_by: "combine = reduced" });
    let error = refused(&rig, "tokens", || tensors.set_num_tokens(&**session.gpu(), 9));
    assert_config(error, "num_tokens", 9_u32, Limit::AtMostField { field: "max_tokens", max: 8 });
    let short = Tokens { x: &[0; 128], topk_idx: &[0; 4], topk_weights: &[0.0; 3] };
    let error = refused(&rig, "weights short", || session.load(tensors, 4, &short));
    assert_config(error, "topk_weights.len()", 3_u64, Limit::Exactly { field: "topk_idx.len()", value: 4 });
    let odd = Tokens { x: &[0; 128], topk_idx: &[0; 5], topk_weights: &[0.0; 5] };
    let error = refused(&rig, "ids odd", || session.load(tensors, 4, &odd));
    assert_config(error, "topk_idx.len()", 5_u64, Limit::Exactly { field: "tokens x num_topk", value: 4 });
    let narrow = Tokens { x: &[0; 127], topk_idx: &[0; 4], topk_weights: &[0.0; 4] };
    let error = refused(&rig, "x short", || session.load(tensors, 4, &narrow));
    assert_config(error, "x.len()", 127_u64, Limit::Exactly { field: "tokens x hidden", value: 128 });
    let error = refused(&rig, "rank", || rig.world().replace_peer(Rank(2), Replacement::default()));
    assert_config(error, "rank", 2_u32, Limit::Range { min: 0, max: 1 });
    for depth in [3_u8, 16] {
        let change = Replacement { sq_depth_log: Some(depth) };
        let error = refused(&rig, "depth", || rig.world().replace_peer(Rank(1), change));
        assert_config(error, "sq_depth_log", u32::from(depth), Limit::Range { min: 4, max: 15 });
    }
    let error = refused(&rig, "start", || session.start_at(&[]));
    assert_config(error, "lanes to start", 0_u64, Limit::Exactly { field: "lanes", value: 1 });
    let error = refused(&rig, "live slots", || session.offer(Rank(1), None));
    assert!(matches!(error, Error::Stale(_)), "{error:?}");
}

#[test]
fn halves_out_of_order_are_refused() {
    let rig = rig(&config());
    let plan = StepPlan::default();
    let inputs: Vec<_> = (0..2).map(|rank| by_hand(&rig, rank, |t, k| ((t + k) % 6) as i32)).collect();
    rig.load(&inputs, &plan).unwrap();
    let call = DispatchCall { halves: Halves::Send, ..DispatchCall::new(4) };
    let send = |rank: &RigRank| rank.session.dispatch(Lane(0), &rank.stream, &rank.tensors, &call);
    let mut handles: Vec<Vec<_>> = Vec::new();
    for rank in rig.ranks() {
        handles.push((0..2).map(|_| send(rank).unwrap()).collect());
    }
    rig.synchronize().unwrap();
    let (one, other) = (&rig.ranks()[0], &rig.ranks()[1]);
    let error = refused(&rig, "a third send into a ring of two", || send(one));
    let Error::Exhausted(exhausted) = error else { panic!("{error:?}") };
    assert_eq!((exhausted.resource, exhausted.limit), (Resource::RingSlots, 2));
    let early = |h| one.session.combine(h, &one.stream, &one.tensors, CombineSource::ZeroCopy, Halves::Both);
    let error = refused(&rig, "a combine before the receive", || early(&handles[0][0]));
    assert!(matches!(error, Error::Stale(_)));
    let error = refused(&rig, "a capture with sends unreceived", || one.session.begin_capture(&one.stream));
    assert!(matches!(error, Error::Exhausted(_)));
    let foreign = || other.session.dispatch_receive(&handles[0][0], &other.stream, &other.tensors);
    let error = refused(&rig, "another session's handle", foreign);
    assert!(matches!(error, Error::Stale(_)));
    for (rank, handles) in rig.ranks().iter().zip(&handles) {
        for handle in handles {
            rank.session.dispatch_receive(handle, &rank.stream, &rank.tensors).unwrap();
        }
    }
    rig.synchronize().unwrap();
    let again = || one.session.dispatch_receive(&handles[0][0], &one.stream, &one.tensors);
    let error = refused(&rig, "a second receive", again);
    assert!(matches!(error, Error::Stale(_)));
    one.session.begin_capture(&one.stream).unwrap();
    let captured = send(one).unwrap();
    let Err(Error::Exhausted(_)) = one.session.end_capture() else {
        panic!("a captured send owes its receive")
    };
    drop(captured);
    drop(handles);
    let verdict = rig.step(&inputs, &plan).unwrap();
    assert_eq!((verdict.wrong, verdict.lost), (0, 0), "{verdict:?}");
}

/// One dispatch of both halves on every rank, run to its end.
fn dispatched(rig: &Rig) -> Vec<DispatchHandle> {
    let dispatch = |rank: &RigRank| {
        rank.session.dispatch(Lane(0), &rank.stream, &rank.tensors, &DispatchCall::new(4)).unwrap()
    };
    let handles = rig.ranks().iter().map(dispatch).collect();
    rig.synchronize().unwrap();
    handles
}

fn assert_stale<T>(rig: &Rig, what: &str, call: impl FnOnce() -> Result<T, Error>) {
    let error = refused(rig, what, call);
    assert!(matches!(&error, Error::Stale(stale) if stale.what.starts_with(what)), "{what}: {error:?}");
}

#[test]
fn a_receive_that_does_not_belong_to_its_combine_is_refused() {
    let rig = rig(&config());
    let (one, other) = (&rig.ranks()[0], &rig.ranks()[1]);
    let (first, second) = (dispatched(&rig), dispatched(&rig));
    let send = |rank: &RigRank, h| {
        let (stream, t) = (&rank.stream, &rank.tensors);
        rank.session.combine(h, stream, t, CombineSource::ZeroCopy, Halves::Send).unwrap()
    };
    let tickets = [send(one, &first[0]), send(other, &first[1])];
    rig.synchronize().unwrap();
    let receive = |rank: &RigRank, h, ticket| rank.session.combine_receive(h, ticket, &rank.stream);
    assert_stale(&rig, "dispatch handle", || receive(one, &second[0], &tickets[0]));
    assert_stale(&rig, "dispatch handle", || receive(one, &first[1], &tickets[0]));
    assert_stale(&rig, "combine ticket", || receive(one, &first[0], &tickets[1]));
    receive(one, &first[0], &tickets[0]).unwrap();
    receive(other, &first[1], &tickets[1]).unwrap();
    rig.synchronize().unwrap();
    assert_stale(&rig, "combine ticket", || receive(one, &first[0], &tickets[0]));
}

#[test]
fn more_dispatches_than_handles_are_refused_until_one_is_dropped() {
    let rig = rig(&config());
    let one = &rig.ranks()[0];
    // A ring of two has twice as many handles.
    let mut held: Vec<_> = (0..4).map(|_| dispatched(&rig)).collect();
    let dispatch = || one.session.dispatch(Lane(0), &one.stream, &one.tensors, &DispatchCall::new(4));
    let Error::Exhausted(exhausted) = refused(&rig, "a fifth handle", dispatch) else {
        panic!("handles are what ran out")
    };
    let expected = Exhausted { resource: Resource::Handles, limit: 4, in_use: 4, requested: 1 };
    assert_eq!(exhausted, expected);
    held.pop();
    held.push(dispatched(&rig));
}

#[test]
fn tensors_of_another_session_are_refused_by_every_call() {
    let rig = rig(&config());
    let (one, foreign) = (&rig.ranks()[0], &rig.ranks()[1].tensors);
    let RigRank { session, stream, .. } = one;
    let call = DispatchCall { halves: Halves::Send, ..DispatchCall::new(4) };
    let received = dispatched(&rig);
    let send = |rank: &RigRank| rank.session.dispatch(Lane(0), &rank.stream, &rank.tensors, &call).unwrap();
    let sent: Vec<_> = rig.ranks().iter().map(send).collect();
    rig.synchronize().unwrap();
    let tokens = Tokens { x: &[], topk_idx: &[], topk_weights: &[] };
    assert_stale(&rig, "tensors", || session.load(foreign, 4, &tokens));
    assert_stale(&rig, "tensors", || session.dispatch(Lane(0), stream, foreign, &call));
    assert_stale(&rig, "tensors", || session.dispatch_receive(&sent[0], stream, foreign));
    assert_stale(&rig, "tensors", || session.run_expert(stream, foreign));
    let combine = || session.combine(&received[0], stream, foreign, CombineSource::Staged, Halves::Both);
    assert_stale(&rig, "tensors", combine);
    assert_stale(&rig, "tensors", || session.finish(stream, foreign, 0));
    let (mut mixed, mut others) = (session.tensors().unwrap(), rig.ranks()[1].session.tensors().unwrap());
    std::mem::swap(&mut mixed.expert_out, &mut others.expert_out);
    assert_stale(&rig, "expert_out", || session.dispatch(Lane(0), stream, &mixed, &call));
}

type Field = fn(&mut Tensors) -> &mut DeviceMemory;

#[test]
fn a_tensor_that_is_one_byte_short_is_refused_by_name() {
    let rig = rig(&Config { dtype: WireDtype::Fp8, ..config() });
    let RigRank { session, stream, .. } = &rig.ranks()[0];
    let fields: [(&str, Field); 13] = [
        ("x.len()", |t| &mut t.x),
        ("topk_idx.len()", |t| &mut t.topk_idx),
        ("topk_weights.len()", |t| &mut t.topk_weights),
        ("num_tokens.len()", |t| &mut t.num_tokens),
        ("packed_x.len()", |t| &mut t.packed_x),
        ("packed_scales.len()", |t| t.packed_scales.as_mut().unwrap()),
        ("source_info.len()", |t| &mut t.source_info),
        ("expert_counts.len()", |t| &mut t.expert_counts),
        ("layout_ranges.len()", |t| &mut t.layout_ranges),
        ("source_ok.len()", |t| &mut t.source_ok),
        ("out.len()", |t| &mut t.out),
        ("lost_topk.len()", |t| &mut t.lost_topk),
        ("expert_ids.len()", |t| &mut t.expert_ids),
    ];
    for (name, field) in fields {
        let mut t = session.tensors().unwrap();
        let len = field(&mut t).len();
        *field(&mut t) = session.gpu().alloc(len - 1, 64).unwrap();
        let error = refused(&rig, name, || session.dispatch(Lane(0), stream, &t, &DispatchCall::new(4)));
        let limit = Limit::AtLeastField { field: "bytes of the plan", min: len as u64 };
        assert_config(error, name, len as u64 - 1, limit);
    }
    let mut t = session.tensors().unwrap();
    t.packed_scales = None;
    let error = refused(&rig, "no scales", || session.dispatch(Lane(0), stream, &t, &DispatchCall::new(4)));
    assert!(matches!(error, Error::Config(e) if e.field == "packed_scales.len()"));
}

#[test]
fn a_graph_of_another_session_is_refused() {
    let rig = rig(&config());
    let (one, other) = (&rig.ranks()[0], &rig.ranks()[1]);
    one.session.begin_capture(&one.stream).unwrap();
    one.launch(4, &StepPlan::default()).unwrap();
    let graph = one.session.end_capture().unwrap();
    let error = refused(&rig, "a foreign graph", || other.session.replay(&graph, &other.stream));
    assert!(matches!(error, Error::Stale(_)));
}

/// One rank's input with the routes that `pick` says.
fn by_hand(rig: &Rig, rank: u16, pick: impl Fn(u32, u32) -> i32) -> RankInput {
    let config = rig.config();
    let key = InputKey { seed: 5, iteration: 0, rank: Rank(rank) };
    let mut input = RankInput::generate(config, Routing::Uniform, key, config.max_tokens);
    for token in 0..input.num_tokens {
        for k in 0..input.num_topk {
            input.topk_idx[(token * input.num_topk + k) as usize] = pick(token, k);
        }
    }
    input
}

const MODES: [CombineMode; 2] = [CombineMode::Exact, CombineMode::Reduced];

/// Two steps whose routes are set by hand; nothing differs from the reference. Returns how many picks were lost.
fn lost_by_hand(combine: CombineMode, dtype: WireDtype, pick: impl Fn(u16, u32, u32) -> i32) -> u64 {
    let rig = rig(&Config { combine, dtype, ..config() });
    let inputs: Vec<_> = (0..2).map(|rank| by_hand(&rig, rank, |t, k| pick(rank, t, k))).collect();
    let mut lost = 0;
    for _ in 0..2 {
        let verdict = rig.step(&inputs, &StepPlan::default()).unwrap();
        assert_eq!((verdict.wrong, verdict.excess_losses), (0, 0), "{combine} {dtype}: {verdict:?}");
        lost = verdict.lost;
    }
    lost
}

#[test]
fn odd_routes_are_served() {
    for combine in MODES {
        for dtype in [WireDtype::Bf16, WireDtype::Fp8] {
            // Nobody picks anything.
            assert_eq!(lost_by_hand(combine, dtype, |_, _, _| -1), 0);
            // Every token to one rank, which holds experts 0 to 2; then all to one expert.
            assert_eq!(lost_by_hand(combine, dtype, |_, t, k| ((t + k) % 3) as i32), 0);
            assert_eq!(lost_by_hand(combine, dtype, |_, _, k| if k == 0 { 4 } else { -1 }), 0);
            // One expert picked twice and three times by one token: one packed row, every weight counts.
            assert_eq!(lost_by_hand(combine, dtype, |_, t, k| [1, 5, 1, 3][((t + k) % 4) as usize]), 0);
            assert_eq!(lost_by_hand(combine, dtype, |_, _, k| if k == 2 { 0 } else { 5 }), 0);
        }
    }
}

/// The routing that needs the most room: at the published shape, every pick of all ranks belongs to rank 3.
#[test]
fn all_tokens_of_eight_ranks_may_go_to_one() {
    let config = Config { route: RoutePolicy::Ibgda, detect_ms: 60_000, ..Config::default() };
    let options = WorldOptions { backing: Backing::OnFirstUse, ..WorldOptions::default() };
    let rig = Rig::new(&config, &options).unwrap();
    assert!(rig.ranks().iter().all(|rank| rank.session.buffer_bytes() <= 128 << 20));
    let first = rig.config().first_expert(Rank(3));
    let pick = |t: u32, k: u32| (first + (8 * t + k) % 32) as i32;
    let inputs: Vec<_> = (0..8).map(|rank| by_hand(&rig, rank, pick)).collect();
    let verdict = rig.step(&inputs, &StepPlan::default()).unwrap();
    assert_eq!((verdict.wrong, verdict.lost), (0, 0), "{verdict:?}");
    assert!(verdict.checked > 8 * 128 * 8, "every packed row and every output: {verdict:?}");
}

#[test]
fn an_expert_that_does_not_exist_is_lost_not_served() {
    for combine in MODES {
        // Pick 2 of every token: 2 ranks x 8 tokens.
        let wrong = [6, 65_535, 65_536, i32::MAX];
        for id in wrong {
            assert_eq!(
                lost_by_hand(combine, WireDtype::Bf16, |_, t, k| if k == 2 {
                    id
                } else {
                    ((t + k) % 6) as i32
                }),
                16
            );
        }
    }
}

#[test]
fn ranks_without_tokens_take_part() {
    let rig = rig(&config());
    for tokens in [[0, 8], [8, 0], [0, 0], [1, 3]] {
        let input = |rank: usize| {
            let key = InputKey { seed: 3, iteration: 0, rank: Rank(rank as u16) };
            RankInput::generate(rig.config(), Routing::Uniform, key, tokens[rank])
        };
        let verdict = rig.step(&[input(0), input(1)], &StepPlan::default()).unwrap();
        assert_eq!((verdict.wrong, verdict.lost), (0, 0), "{tokens:?}: {verdict:?}");
    }
}

#[test]
fn the_published_setting_fits_128_mib() {
    for dtype in [WireDtype::Bf16, WireDtype::Fp8] {
        let config = Config { dtype, ..Config::default() }.validate().unwrap();
        for rank in 0..8 {
            let bytes = buffer_bytes(&config, Rank(rank));
            assert!(bytes <= 128 << 20, "{dtype}: {bytes} bytes");
        }
    }
}

#[test]
fn announced_sizes_are_what_is_allocated() {
    for dtype in [WireDtype::Bf16, WireDtype::Fp8] {
        let config = Config { dtype, lanes: 2, num_ranks: 3, num_experts: 7, ..config() };
        let announced = buffer_bytes(&config.validate().unwrap(), Rank(0));
        let world = World::new(&config, &WorldOptions::default()).unwrap();
        for session in world.sessions() {
            assert_eq!(session.buffer_bytes(), announced);
            // Control queue pairs are the host's own, and live in its memory.
            let on_gpu = session.gpu().allocated_bytes();
            assert_eq!(on_gpu + session.host_bytes(), announced);
            let tensors = session.tensors().unwrap();
            assert_eq!(session.gpu().allocated_bytes() - on_gpu, session.tensor_bytes());
            drop(tensors);
            assert_eq!(session.gpu().allocated_bytes(), on_gpu);
        }
    }
}
