//! The shipped post kernel against one emulated device, beside memcpy of the same bytes; see also `ibex bench post`.

#![expect(missing_docs, reason = "criterion's macros make public functions")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ibex::harness::post::{INLINE_LEN, PostCase, PostRig};

fn posts(c: &mut Criterion) {
    let mut group = c.benchmark_group("post");
    group.sample_size(20);
    for (bytes, inline) in [(INLINE_LEN, true), (7168, false)] {
        let case = PostCase { bytes, inline, num_qps: 1, slots: 4096, batch: 32, sq_depth_log: 9 };
        let mut rig = PostRig::new(case, ibex::config::Link::Roce).expect("the emulator takes this case");
        let total = u64::from(bytes) * u64::from(case.slots);
        group.throughput(Throughput::Bytes(total));
        group.bench_function(BenchmarkId::new("kernel", bytes), |b| {
            b.iter(|| rig.round().expect("every WQE completes"));
        });
        let (from, mut to) = (vec![1u8; total as usize], vec![0u8; total as usize]);
        group.bench_function(BenchmarkId::new("memcpy", bytes), |b| {
            b.iter(|| {
                for (to, from) in to.chunks_mut(bytes as usize).zip(from.chunks(bytes as usize)) {
                    black_box(to).copy_from_slice(black_box(from));
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, posts);
criterion_main!(benches);
