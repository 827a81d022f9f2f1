//! Every mode at the published shape: 8 ranks, 128 tokens, hidden 7168, 256 experts, top-8, all over queue pairs.
//!
//! The matrix has 64 cells: routing x dtype x combine x signal mode x link. By default each cell is run once, with a
//! seed of its own; `IBEX_FULL=1` runs each with the seeds 1 to 20 and prints what it found, group by group.
//! Devices are strict: a WQE runs only once a doorbell covers it. Every row and output is compared with the reference.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::ops::AddAssign;

use ibex::config::{CombineMode, Config, Link, RoutePolicy, SignalMode, WireDtype};
use ibex::gpu::Backing;
use ibex::harness::{Rig, StepPlan, on_all_cores};
use ibex::ids::Rank;
use ibex::reference::inputs::{InputKey, RankInput};
use ibex::reference::routing::Routing;
use ibex::session::WorldOptions;
use ibex_hca::emulated::Doorbells;

/// Seeds of the whole sweep.
const SEEDS: u64 = 20;

/// What must be zero but for the first two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Found {
    steps: u64,
    checked: u64,
    wrong: u64,
    lost: u64,
    unrung: u64,
}

impl AddAssign for Found {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.checked += other.checked;
        self.wrong += other.wrong;
        self.lost += other.lost;
        self.unrung += other.unrung;
    }
}

/// One world's modes. Routings and seeds share a world.
#[derive(Clone, Copy, Debug)]
struct Group {
    dtype: WireDtype,
    combine: CombineMode,
    signal: SignalMode,
    link: Link,
}

fn groups() -> Vec<Group> {
    let mut groups = Vec::new();
    for dtype in [WireDtype::Fp8, WireDtype::Bf16] {
        for combine in [CombineMode::Exact, CombineMode::Reduced] {
            for signal in [SignalMode::Write, SignalMode::FetchAdd] {
                groups.extend([Link::Roce, Link::Ib].map(|link| Group { dtype, combine, signal, link }));
            }
        }
    }
    groups
}

fn rig(group: Group) -> Rig {
    let Group { dtype, combine, signal, link } = group;
    // A machine that is busy with other things must not make a peer look dead.
    let (route, detect_ms) = (RoutePolicy::Ibgda, 5_000);
    let config = Config { dtype, combine, signal, link, route, detect_ms, ..Config::default() };
    let options = WorldOptions {
        doorbells: Doorbells::Strict,
        backing: Backing::OnFirstUse,
        ..WorldOptions::default()
    };
    Rig::new(&config, &options).unwrap()
}

fn step(rig: &Rig, routing: Routing, seed: u64) -> Found {
    let config = rig.config();
    let draw = |rank: usize| {
        let key = InputKey { seed, iteration: seed, rank: Rank(rank as u16) };
        RankInput::generate(config, routing, key, config.max_tokens)
    };
    let inputs = on_all_cores(rig.ranks().len(), draw);
    for rank in rig.ranks() {
        rank.wipe_outputs().unwrap();
    }
    let verdict = rig.step(&inputs, &StepPlan::default()).unwrap();
    // Every pick that is not masked is a row, and every token an output.
    let tokens = u64::from(config.max_tokens) * rig.ranks().len() as u64;
    assert!(verdict.checked > 7 * tokens, "{verdict:?}");
    Found { steps: 1, checked: verdict.checked, wrong: verdict.wrong, lost: verdict.lost, unrung: 0 }
}

fn run(group: Group, seeds_of: impl Fn(usize) -> Vec<u64>) -> Found {
    let rig = rig(group);
    let mut found = Found::default();
    for (index, routing) in Routing::ALL.iter().enumerate() {
        for seed in seeds_of(index) {
            let one = step(&rig, *routing, seed);
            assert_eq!((one.wrong, one.lost), (0, 0), "{group:?}, {routing}, seed {seed}: {one:?}");
            found += one;
        }
    }
    // Violations of the doorbell rule that the devices counted, at the end of a run too.
    found.unrung = rig.world().devices().iter().map(|d| d.check_unrung() + d.counters().unrung_wqes).sum();
    assert_eq!(found.unrung, 0, "{group:?}");
    found
}

/// One test, so that two worlds of this size never live at the same time.
#[test]
fn every_mode_at_the_published_shape_agrees_with_the_reference() {
    let full = std::env::var_os("IBEX_FULL").is_some_and(|value| value == "1");
    let mut total = Found::default();
    for (index, group) in groups().into_iter().enumerate() {
        let seeds = |routing: usize| match full {
            true => (1..=SEEDS).collect(),
            false => vec![1 + (index * Routing::ALL.len() + routing) as u64 % SEEDS],
        };
        let found = run(group, seeds);
        if full {
            println!("{group:?}: {found:?}");
        }
        total += found;
    }
    assert_eq!((total.wrong, total.lost, total.unrung), (0, 0, 0));
    let per_cell = if full { SEEDS } else { 1 };
    assert_eq!(total.steps, 64 * per_cell);
    let part =
        if full { "the whole sweep, seeds 1-20" } else { "one seed a cell; IBEX_FULL=1 runs seeds 1-20" };
    println!("published shape, 64 cells ({part}): {total:?}");
}
