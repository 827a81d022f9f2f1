//! Sessions driven by their keepers: a group forms, loses ranks, agrees, serves on, and is made whole, while graphs
//! that were captured before stay valid.
#![expect(clippy::unwrap_used, reason = "a scenario that cannot be set up is a failed test")]

use std::collections::BTreeMap;
use std::sync::Arc;

use ibex::config::{RoutePolicy, WireDtype};
use ibex::error::{Error, Evidence};
use ibex::membership::{RankSet, Stop};
use ibex::session::{Happening, Tokens};
use ibex::{Config, Rank};
use ibex_abi::prm::{Op, Status};
use ibex_hca::AsyncEvent;
use ibex_hca::emulated::EmulatedHca;
use ibex_hca::fault::{Fault, FaultHca};
use parking_lot::Mutex;

#[path = "group/hub.rs"]
mod hub;
#[path = "group/replays.rs"]
mod replays;
#[path = "group/rig.rs"]
mod rig;

use rig::{Group, Wrap};

const TOKENS: u32 = 4;
const TOPK: u32 = 2;
const HIDDEN: u32 = 32;
/// Two experts of every rank, each picked once; ranks hold two experts.
const PICKS: [i32; 8] = [0, 7, 1, 6, 2, 5, 3, 4];
/// The same without what rank 3 holds.
const PICKS_WITHOUT_3: [i32; 8] = [0, -1, 1, -1, 2, 5, 3, 4];

fn config() -> Config {
    Config {
        num_ranks: 4,
        max_tokens: TOKENS,
        hidden: HIDDEN,
        num_experts: 8,
        max_topk: TOPK,
        dtype: WireDtype::Bf16,
        route: RoutePolicy::Ibgda,
        ring: 2,
        channels: Some(1),
        sq_depth_log: 5,
        num_sms: 1,
        warps_per_block: 2,
        num_owner_warps: Some(1),
        detect_ms: 20,
        ..Config::default()
    }
}

fn bare() -> Wrap {
    Box::new(|_, device| device)
}

struct Inputs {
    x: Vec<u16>,
    weights: Vec<f32>,
}

impl Inputs {
    fn new() -> Self {
        let x = (0..TOKENS * HIDDEN).map(|i| 0x3f80 + (i as u16 % 7)).collect();
        Self { x, weights: vec![0.5; PICKS.len()] }
    }

    fn with<'a>(&'a self, picks: &'a [i32]) -> Tokens<'a> {
        Tokens { x: &self.x, topk_idx: picks, topk_weights: &self.weights }
    }
}

/// A group of `ranks` that serves.
fn formed(ranks: &[u16], wrap: Wrap) -> Group {
    let mut group = Group::new(config(), ranks.iter().map(|rank| Rank(*rank)).collect(), wrap);
    for rank in ranks {
        group.start(Rank(*rank)).ready(1);
    }
    group.run_until_members(ranks);
    group
}

#[test]
fn a_dead_rank_is_agreed_on_and_replaced_while_a_captured_graph_stays_valid() {
    let inputs = Inputs::new();
    let (all, left) = ([0, 1, 2, 3], [0, 1, 2]);
    let mut group = formed(&all, bare());
    let whole = group.finish(&group.launch(&all, &inputs.with(&PICKS), TOPK), TOKENS);
    assert!(whole.iter().all(|rank| rank.lost_topk == [0; 4]));
    let fewer = group.finish(&group.launch(&all, &inputs.with(&PICKS_WITHOUT_3), TOPK), TOKENS);
    let captured = group.capture(&left, &inputs.with(&PICKS), TOPK);
    let frozen: Vec<_> = captured.iter().map(|(run, _)| run.session().frozen_bytes()).collect();

    group.kill(Rank(3));
    // The step that meets the dead rank ends by the kernels' deadlines, and says what is lost.
    let lost: Vec<u32> =
        PICKS.chunks(2).map(|picks| picks.iter().rev().fold(0, |m, p| m << 1 | u32::from(*p >= 6))).collect();
    for run in group.replay(&captured, TOKENS) {
        assert_eq!(run.lost_topk, lost);
    }
    group.run_until_members(&left);
    for rank in left {
        let is_silent = |what: &Happening| {
            matches!(what, Happening::Suspected { peer: Rank(3), evidence, fault: Some(_) }
                if matches!(evidence, Evidence::Silent { .. } | Evidence::Syndrome { .. }))
        };
        assert_eq!(group.happened(Rank(rank), is_silent), 1, "{}", group.report());
    }
    for (run, before) in group.replay(&captured, TOKENS).iter().zip(&fewer) {
        assert_eq!((&run.out, &run.lost_topk), (&before.out, &lost), "served on, the loss reported");
    }

    let session = group.start(Rank(3));
    group.run_for_ms(100);
    assert!(!group.on(Rank(3), |keeper, _| keeper.is_serving()), "not before it is ready");
    session.ready(2);
    group.run_until_members(&all);
    let after = group.launch(&[3], &inputs.with(&PICKS), TOPK);
    assert_eq!(group.replay(&captured, TOKENS)[..], whole[..3], "whole again");
    assert_eq!(group.finish(&after, TOKENS)[0], whole[3]);
    for ((run, _), before) in captured.iter().zip(frozen) {
        assert_eq!(run.session().frozen_bytes(), before);
    }
}

#[test]
fn ranks_come_and_leave_at_a_gate_without_a_loss() {
    let inputs = Inputs::new();
    let mut group = Group::new(Config { local_experts: Some(4), ..config() }, RankSet::first(2), bare());
    for rank in [0, 1] {
        group.start(Rank(rank)).ready(1);
    }
    group.run_until_members(&[0, 1]);
    let two = group.finish(&group.launch(&[0, 1], &inputs.with(&PICKS), TOPK), TOKENS);
    group.start(Rank(2)).ready(1);
    group.run_until_members(&[0, 1, 2]);
    let three = group.finish(&group.launch(&[0, 1, 2], &inputs.with(&PICKS), TOPK), TOKENS);
    assert_eq!(three[..2], two[..]);
    group.on(Rank(2), |keeper, now| keeper.leave(now));
    group.run_until_members(&[0, 1]);
    group.run_for_ms(100);
    assert!(matches!(group.stop_of(Rank(2)), Some(Stop::Left { .. })), "{}", group.report());
    assert_eq!(group.finish(&group.launch(&[0, 1], &inputs.with(&PICKS), TOPK), TOKENS), two);
    let refused = group.on(Rank(2), |keeper, _| {
        let session = Arc::clone(keeper.session());
        let (tensors, stream) = (session.tensors().unwrap(), session.stream());
        session.load(&tensors, TOPK, &inputs.with(&PICKS)).unwrap();
        session.launch_step(&stream, &tensors, TOPK).unwrap_err()
    });
    assert!(matches!(refused, Error::Gated(_)), "{refused:?}");
}

#[test]
fn a_name_is_taken_again_at_once_and_the_store_may_be_away_meanwhile() {
    let mut group = formed(&[0, 1, 2, 3], bare());
    group.hub.set_away(true);
    group.kill(Rank(2));
    group.run_for_ms(100);
    let agreed = |what: &Happening| matches!(what, Happening::Agreed { .. });
    assert_eq!(group.happened(Rank(0), agreed), 1, "no store, no other epoch");
    group.hub.set_away(false);
    group.start(Rank(2)).ready(1);
    group.run_until_members(&[0, 1, 2, 3]);
    let superseded =
        |what: &Happening| matches!(what, Happening::Agreed { members, .. } if members.len() == 3);
    assert_eq!(group.happened(Rank(0), superseded), 1, "the old one leaves before the new one comes");
    let inputs = Inputs::new();
    let whole = group.finish(&group.launch(&[0, 1, 2, 3], &inputs.with(&PICKS), TOPK), TOKENS);
    assert!(whole.iter().all(|rank| rank.lost_topk == [0; 4]));
}

/// Devices whose next commands can be refused.
#[derive(Clone, Default)]
struct Faulty(Arc<Mutex<BTreeMap<Rank, Arc<FaultHca<EmulatedHca>>>>>);

impl Faulty {
    fn wrap(&self) -> Wrap {
        let devices = self.clone();
        Box::new(move |rank, device| {
            let faulty = FaultHca::new(device);
            devices.0.lock().insert(rank, Arc::clone(&faulty));
            faulty
        })
    }

    fn refuse(&self, rank: Rank, op: Op) {
        assert!(self.0.lock()[&rank].inject(Fault::refuse(op, Status::IntErr)));
    }

    fn report(&self, rank: Rank, event: AsyncEvent) {
        assert!(self.0.lock()[&rank].report(event));
    }

    fn pending(&self, rank: Rank) -> usize {
        self.0.lock()[&rank].pending()
    }
}

#[test]
fn whatever_command_is_refused_a_replacement_comes_in_all_the_same() {
    let inputs = Inputs::new();
    let all = [0, 1, 2, 3];
    let making = [Op::CreateCq, Op::CreateQp, Op::Rst2InitQp, Op::Init2RtrQp, Op::Rtr2RtsQp];
    for (rank, ops) in [(0, &[Op::ToErrQp, Op::ToRstQp][..]), (0, &making), (1, &making), (3, &making)] {
        for op in ops {
            let faulty = Faulty::default();
            let mut group = formed(&all, faulty.wrap());
            group.kill(Rank(3));
            if rank != 3 {
                faulty.refuse(Rank(rank), *op);
            }
            let session = group.start(Rank(3));
            if rank == 3 {
                faulty.refuse(Rank(3), *op);
            }
            session.ready(1);
            group.run_until_members(&all);
            assert_eq!(faulty.pending(Rank(rank)), 0, "{op:?} of rank {rank} was not struck");
            let whole = group.finish(&group.launch(&all, &inputs.with(&PICKS), TOPK), TOKENS);
            assert!(whole.iter().all(|rank| rank.lost_topk == [0; 4]), "{op:?} of rank {rank}");
        }
    }
}

#[test]
fn what_a_device_reports_of_a_queue_is_evidence_on_which_the_group_agrees() {
    let inputs = Inputs::new();
    let (all, left) = ([0, 1, 2, 3], [0, 1, 2]);
    let faulty = Faulty::default();
    let mut group = formed(&all, faulty.wrap());
    let qpn = group.queue_pairs(Rank(1), Rank(3))[0];
    let event = AsyncEvent::QpAccessError { qpn };
    faulty.report(Rank(1), AsyncEvent::PortDown { port_num: 1 });
    faulty.report(Rank(1), event);
    group.run_until_members(&left);
    let by_device = |what: &Happening| {
        let expected = Evidence::Device { event };
        matches!(what, Happening::Suspected { peer: Rank(3), evidence, fault: None } if *evidence == expected)
    };
    assert_eq!(group.happened(Rank(1), by_device), 1, "{}", group.report());
    let told = |what: &Happening| matches!(what, Happening::Device(_));
    assert_eq!([0, 1, 2].map(|rank| group.happened(Rank(rank), told)), [0, 2, 0], "{}", group.report());
    // Who is outside has stopped; its successor comes in.
    assert!(matches!(group.stop_of(Rank(3)), Some(Stop::Fenced { .. })), "{}", group.report());
    group.kill(Rank(3));
    group.start(Rank(3)).ready(1);
    group.run_until_members(&all);
    let whole = group.finish(&group.launch(&all, &inputs.with(&PICKS), TOPK), TOKENS);
    assert!(whole.iter().all(|rank| rank.lost_topk == [0; 4]));
}
