//! Dispatch and combine on the embedded emulator, beside a memcpy of the bytes that one step puts on the wire.
//!
//! The shape is a quarter of the published one, so that a run takes seconds; `ibex bench ep` measures the published
//! setting with percentiles and the floor that the algorithm cannot beat.

#![expect(missing_docs, reason = "criterion's macros make public functions")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ibex::config::{Config, RoutePolicy};
use ibex::harness::{Rig, StepPlan};
use ibex::ids::Rank;
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::WorldOptions;
use ibex_hca::emulated::Doorbells;

fn steps(c: &mut Criterion) {
    let config = Config {
        max_tokens: 64,
        hidden: 3584,
        num_experts: 64,
        route: RoutePolicy::Ibgda,
        detect_ms: 5000,
        ..Config::default()
    };
    let options = WorldOptions { doorbells: Doorbells::Record, ..WorldOptions::default() };
    let rig = Rig::new(&config, &options).expect("the emulator takes this configuration");
    let inputs: Vec<RankInput> = (0..config.num_ranks)
        .map(|rank| {
            let key = InputKey { seed: 1, iteration: 0, rank: Rank(rank as u16) };
            RankInput::generate(rig.config(), Routing::Uniform, key, config.max_tokens)
        })
        .collect();
    let plan = StepPlan::default();
    rig.load(&inputs, &plan).expect("inputs fit");
    let before = wire_bytes(&rig);
    rig.launch(config.max_topk, &plan).and_then(|()| rig.synchronize()).expect("a step runs");
    let bytes = wire_bytes(&rig) - before;

    let mut group = c.benchmark_group("step of 8 ranks");
    group.throughput(Throughput::Bytes(bytes));
    group.sample_size(20);
    group.bench_function("dispatch + expert + combine", |b| {
        b.iter(|| rig.launch(config.max_topk, &plan).and_then(|()| rig.synchronize()).expect("a step runs"));
    });
    let (from, mut to) = (vec![1u8; bytes as usize], vec![0u8; bytes as usize]);
    group.bench_function("memcpy of its wire bytes, one thread", |b| {
        b.iter(|| black_box(&mut to).copy_from_slice(black_box(&from)));
    });
    group.finish();
}

fn wire_bytes(rig: &Rig) -> u64 {
    rig.world().devices().iter().map(|device| device.counters().bytes_written).sum()
}

criterion_group!(benches, steps);
criterion_main!(benches);
