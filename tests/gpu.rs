//! The host GPU on real kernels: streams, graphs, devices that wait for each other, simulation.
#![expect(unsafe_code, reason = "launches hand addresses to kernels")]
#![expect(clippy::unwrap_used, reason = "test helpers: a failed expectation is the message")]

use std::sync::Arc;

use ibex::gpu::pool::{Pool, PoolConfig};
use ibex::gpu::{DeviceMemory, Gpu, GpuError, GpuField, HostGpu, KernelId, Launch, Stream};
use ibex::time::Stopwatch;

fn pool(workers: u32) -> Arc<Pool> {
    Arc::new(Pool::new(PoolConfig::real_time(workers)).unwrap())
}

fn simulation(seed: u64) -> Arc<Pool> {
    Arc::new(Pool::new(PoolConfig::simulation(seed)).unwrap())
}

/// A counter that the empty kernel adds one to per warp.
struct Counter {
    memory: DeviceMemory,
}

impl Counter {
    fn new(gpu: &HostGpu) -> Self {
        Self { memory: gpu.alloc(8, 8).unwrap() }
    }

    fn launch(
        &self,
        gpu: &HostGpu,
        stream: &Stream,
        blocks: u32,
        warps_per_block: u32,
    ) -> Result<(), GpuError> {
        let args = self.memory.addr().to_ne_bytes();
        let launch = Launch { kernel: KernelId::SelftestEmpty, args: &args, blocks, warps_per_block };
        // SAFETY: the bytes are `SelftestEmptyArgs`; the counter outlives the stream's work in
        // every test here.
        unsafe { gpu.launch(stream, &launch) }
    }

    fn value(&self, gpu: &HostGpu) -> u32 {
        gpu.load_u32(self.memory.addr()).unwrap()
    }
}

#[test]
fn launches_of_a_stream_add_up() {
    let gpu = HostGpu::new(pool(2), 0);
    let stream = gpu.stream();
    let counter = Counter::new(&gpu);
    for _ in 0..100 {
        counter.launch(&gpu, &stream, 3, 4).unwrap();
    }
    gpu.synchronize(&stream).unwrap();
    assert_eq!(counter.value(&gpu), 1200);
}

#[test]
fn one_captured_graph_replays_ten_thousand_times() {
    let gpu = HostGpu::new(pool(2), 0);
    let (main, side) = (gpu.stream(), gpu.stream());
    let (fork, join) = (gpu.event(), gpu.event());
    let counter = Counter::new(&gpu);
    gpu.begin_capture(&main).unwrap();
    gpu.record(&fork, &main).unwrap();
    gpu.wait(&fork, &side).unwrap();
    counter.launch(&gpu, &side, 1, 1).unwrap();
    gpu.record(&join, &side).unwrap();
    counter.launch(&gpu, &main, 1, 1).unwrap();
    gpu.wait(&join, &main).unwrap();
    counter.launch(&gpu, &main, 1, 2).unwrap();
    let graph = gpu.end_capture(&main).unwrap();
    gpu.synchronize(&side).unwrap();
    assert_eq!(counter.value(&gpu), 0, "capture runs nothing");

    let watch = Stopwatch::start();
    for _ in 0..10_000 {
        gpu.replay(&graph, &main).unwrap();
    }
    gpu.synchronize(&main).unwrap();
    println!("replay of a graph of 3 launches: {} ns", watch.elapsed_ns() / 10_000);
    assert_eq!(counter.value(&gpu), 40_000);
    assert_eq!(gpu.captures(), 1);
}

/// Runs the ping-pong kernel on two devices at once and returns what each received.
fn play_pair(pool: &Arc<Pool>, rounds: u32) -> [u64; 2] {
    const N16: u32 = 64;
    let gpus = [0, 1].map(|device| HostGpu::new(Arc::clone(pool), device));
    let flags = gpus.each_ref().map(|gpu| gpu.alloc(4, 4).unwrap());
    let payloads = gpus.each_ref().map(|gpu| gpu.alloc(16 * N16 as usize, 16).unwrap());
    let sums = gpus.each_ref().map(|gpu| gpu.alloc(8, 8).unwrap());
    let streams = gpus.each_ref().map(|gpu| gpu.stream());
    for (me, peer) in [(0, 1), (1, 0)] {
        let addrs = [&flags[me], &flags[peer], &payloads[me], &payloads[peer], &sums[me]];
        let mut args: Vec<u8> = addrs.iter().flat_map(|memory| memory.addr().to_ne_bytes()).collect();
        args.extend([N16, rounds, me as u32, 0].iter().flat_map(|word| word.to_ne_bytes()));
        let launch = Launch { kernel: KernelId::SelftestPair, args: &args, blocks: 1, warps_per_block: 1 };
        // SAFETY: the bytes are `SelftestPairArgs`; all memory lives until both streams are synchronized.
        unsafe { gpus[me].launch(&streams[me], &launch) }.unwrap();
    }
    for (gpu, stream) in gpus.iter().zip(&streams) {
        gpu.synchronize(stream).unwrap();
    }
    [0, 1].map(|me: usize| gpus[me].load_u64(sums[me].addr()).unwrap())
}

/// What the ping-pong kernel receives: words v, v+1, v+2, v+3 of v = 1000 * round + i, i in 0..64.
fn pair_sum(rounds: u64) -> u64 {
    (1..=rounds).flat_map(|round| (0..64).map(move |i| 4 * (round * 1000 + i) + 6)).sum()
}

#[test]
fn kernels_of_two_devices_wait_for_each_other_on_one_thread_or_two() {
    for workers in [1, 2] {
        assert_eq!(play_pair(&pool(workers), 200), [pair_sum(200); 2]);
    }
}

#[test]
fn synchronize_drives_a_simulation_and_a_seed_fixes_its_schedule() {
    let run = |seed| {
        let pool = simulation(seed);
        assert_eq!(play_pair(&pool, 20), [pair_sum(20); 2]);
        pool.stats().schedule_hash
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn a_simulation_in_which_nothing_moves_ends_with_an_error() {
    let config =
        PoolConfig { stuck_after: Some(core::time::Duration::from_secs(1)), ..PoolConfig::simulation(3) };
    let gpu = HostGpu::new(Arc::new(Pool::new(config).unwrap()), 0);
    let stream = gpu.stream();
    let memory = gpu.alloc(4096, 16).unwrap();
    let addr = |offset: u64| memory.addr() + offset;
    let mut args: Vec<u8> = [0, 64, 128, 256, 512].iter().flat_map(|&o| addr(o).to_ne_bytes()).collect();
    // Device 1 waits for a device 0 that does not exist.
    args.extend([1u32, 1, 1, 0].iter().flat_map(|word| word.to_ne_bytes()));
    let launch = Launch { kernel: KernelId::SelftestPair, args: &args, blocks: 1, warps_per_block: 1 };
    // SAFETY: the bytes are `SelftestPairArgs`; the memory lives until the end of the test.
    unsafe { gpu.launch(&stream, &launch) }.unwrap();
    assert!(matches!(gpu.synchronize(&stream), Err(GpuError::Pool(_))));
}

#[test]
fn gpus_of_one_pool_are_driven_from_several_threads() {
    let pool = pool(2);
    std::thread::scope(|scope| {
        for device in 0..4 {
            let pool = Arc::clone(&pool);
            scope.spawn(move || {
                let gpu = HostGpu::new(pool, device);
                let counter = Counter::new(&gpu);
                let streams = [gpu.stream(), gpu.stream()];
                for i in 0..200 {
                    counter.launch(&gpu, &streams[i % 2], 1, 2).unwrap();
                }
                for stream in &streams {
                    gpu.synchronize(stream).unwrap();
                }
                assert_eq!(counter.value(&gpu), 400);
            });
        }
    });
}

#[test]
fn arguments_of_the_wrong_size_are_refused_before_anything_is_queued() {
    let gpu = HostGpu::new(pool(1), 0);
    let stream = gpu.stream();
    let launch = Launch { kernel: KernelId::SelftestEmpty, args: &[0; 16], blocks: 1, warps_per_block: 1 };
    // SAFETY: refused before any kernel sees the bytes.
    let refused = unsafe { gpu.launch(&stream, &launch) };
    assert!(matches!(refused, Err(GpuError::Pool(_))), "{refused:?}");
    let counter = Counter::new(&gpu);
    let too_many = gpu.max_coresident_blocks(4) + 1;
    let refused = counter.launch(&gpu, &stream, too_many, 4);
    let limit = u64::from(too_many) - 1;
    let value = u64::from(too_many);
    assert_eq!(refused, Err(GpuError::OutOfRange { field: GpuField::Blocks, value, min: 1, max: limit }));
    gpu.synchronize(&stream).unwrap();
    assert_eq!(counter.value(&gpu), 0);
}

#[test]
fn everything_may_be_dropped_while_kernels_run() {
    // The last reference to the pool then often goes on one of its own workers.
    for _ in 0..200 {
        let gpu = HostGpu::new(pool(1), 0);
        let stream = gpu.stream();
        let counter = Counter::new(&gpu);
        for _ in 0..4 {
            counter.launch(&gpu, &stream, 2, 2).unwrap();
        }
    }
}
