//! Streams, events, graphs and memory on a scripted executor: a launch ends when the test says so.

use std::sync::atomic::AtomicU64;

use super::super::pool::{PoolConfig, PoolError};
use super::super::{HandleKind, KernelId};
use super::executor::Completion;
use super::queue::STREAM_QUEUE_MAX;
use super::*;

/// Keeps launches until the test finishes them; a launch is known by the first byte of its arguments.
#[derive(Default)]
pub(super) struct Script {
    started: Mutex<Vec<(u8, Completion)>>,
    refuse: Mutex<Vec<u8>>,
    now_ns: AtomicU64,
}

impl Executor for Script {
    fn check(&self, _launch: &FrozenLaunch) -> Result<(), GpuError> {
        Ok(())
    }

    fn start(&self, launch: &FrozenLaunch, done: Completion) -> Result<(), GpuError> {
        let tag = launch.args[0];
        if self.refuse.lock().contains(&tag) {
            return Err(PoolError::NoMemory.into());
        }
        self.started.lock().push((tag, done));
        Ok(())
    }

    fn drive(&self, _until: &mut dyn FnMut() -> bool) -> Result<Drive, GpuError> {
        Ok(Drive::Elsewhere)
    }

    fn kill(&self) -> Result<(), GpuError> {
        self.started.lock().clear();
        Ok(())
    }

    fn freeze(&self, _frozen: bool) -> Result<(), GpuError> {
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        self.now_ns.load(Ordering::Relaxed)
    }
}

impl Script {
    pub(super) fn running(&self) -> Vec<u8> {
        self.started.lock().iter().map(|&(tag, _)| tag).collect()
    }

    pub(super) fn finish(&self, tag: u8) {
        let done = {
            let mut started = self.started.lock();
            let position = started.iter().position(|&(running, _)| running == tag);
            started.remove(position.unwrap_or_else(|| panic!("{tag} does not run"))).1
        };
        self.now_ns.fetch_add(10, Ordering::Relaxed);
        done();
    }

    fn finish_all(&self) {
        while let Some(&tag) = self.running().first() {
            self.finish(tag);
        }
    }
}

pub(super) fn gpu() -> (Arc<Script>, HostGpu) {
    let script = Arc::new(Script::default());
    (Arc::clone(&script), HostGpu::on(script, false))
}

#[expect(unsafe_code, reason = "the scripted executor runs nothing")]
fn try_launch(gpu: &HostGpu, stream: &Stream, args: &[u8], blocks: u32, warps: u32) -> Result<(), GpuError> {
    let launch = Launch { kernel: KernelId::Selftest, args, blocks, warps_per_block: warps };
    // SAFETY: no kernel runs, so no address is used.
    unsafe { gpu.launch(stream, &launch) }
}

pub(super) fn launch(gpu: &HostGpu, stream: &Stream, tag: u8) {
    try_launch(gpu, stream, &[tag], 1, 1).unwrap();
}

#[test]
fn a_stream_runs_in_order_and_streams_run_side_by_side() {
    let (script, gpu) = gpu();
    let (a, b) = (gpu.stream(), gpu.stream());
    launch(&gpu, &a, 1);
    launch(&gpu, &a, 2);
    launch(&gpu, &b, 3);
    assert_eq!(script.running(), [1, 3]);
    script.finish(1);
    assert_eq!(script.running(), [3, 2]);
    script.finish_all();
    gpu.synchronize(&a).unwrap();
    gpu.synchronize(&b).unwrap();
}

#[test]
fn an_event_orders_two_streams() {
    let (script, gpu) = gpu();
    let (a, b) = (gpu.stream(), gpu.stream());
    let event = gpu.event();
    assert_eq!(gpu.query(&event), Ok(true), "a fresh event counts as completed");
    launch(&gpu, &a, 1);
    gpu.record(&event, &a).unwrap();
    launch(&gpu, &a, 2);
    gpu.wait(&event, &b).unwrap();
    launch(&gpu, &b, 3);
    assert_eq!(script.running(), [1]);
    assert_eq!(gpu.query(&event), Ok(false));
    script.finish(1);
    assert_eq!(script.running(), [2, 3]);
    assert_eq!(gpu.query(&event), Ok(true));
    script.finish_all();
}

#[test]
fn a_wait_names_the_recording_that_stood_when_it_was_queued() {
    let (script, gpu) = gpu();
    let (a, b) = (gpu.stream(), gpu.stream());
    let event = gpu.event();
    gpu.wait(&event, &b).unwrap();
    launch(&gpu, &b, 9);
    assert_eq!(script.running(), [9], "an event that was never recorded holds nobody up");
    launch(&gpu, &a, 1);
    gpu.record(&event, &a).unwrap();
    gpu.wait(&event, &b).unwrap();
    launch(&gpu, &b, 3);
    launch(&gpu, &a, 2);
    gpu.record(&event, &a).unwrap();
    script.finish(9);
    script.finish(1);
    assert_eq!(script.running(), [2, 3], "the second recording does not move the earlier wait");
    assert_eq!(gpu.query(&event), Ok(false));
    script.finish_all();
}

#[test]
fn elapsed_time_lies_between_two_completed_events() {
    let (script, gpu) = gpu();
    let stream = gpu.stream();
    let (start, end) = (gpu.event(), gpu.event());
    gpu.record(&start, &stream).unwrap();
    launch(&gpu, &stream, 1);
    launch(&gpu, &stream, 2);
    gpu.record(&end, &stream).unwrap();
    assert_eq!(gpu.elapsed_ns(&start, &end), Err(GpuError::EventPending));
    script.finish_all();
    assert_eq!(gpu.elapsed_ns(&start, &end), Ok(20));
}

#[test]
fn arguments_are_frozen_when_queued() {
    let (script, gpu) = gpu();
    let stream = gpu.stream();
    let mut args = [1];
    launch(&gpu, &stream, 0);
    try_launch(&gpu, &stream, &args, 1, 1).unwrap();
    args[0] = 2;
    script.finish(0);
    assert_eq!((script.running(), args), (vec![1], [2]));
    script.finish_all();
}

/// A on the origin; B there and C on a joined stream after it; D after both.
fn capture_fork_join(gpu: &HostGpu, main: &Stream) -> Graph {
    let side = gpu.stream();
    let (fork, join) = (gpu.event(), gpu.event());
    gpu.begin_capture(main).unwrap();
    launch(gpu, main, b'A');
    gpu.record(&fork, main).unwrap();
    launch(gpu, main, b'B');
    gpu.wait(&fork, &side).unwrap();
    assert_eq!(gpu.is_capturing(&side), Ok(true));
    launch(gpu, &side, b'C');
    gpu.record(&join, &side).unwrap();
    gpu.wait(&join, main).unwrap();
    launch(gpu, main, b'D');
    assert_eq!(gpu.query(&join), Err(CaptureError::EventCaptured.into()));
    let graph = gpu.end_capture(main).unwrap();
    assert_eq!(gpu.is_capturing(&side), Ok(false));
    graph
}

#[test]
fn capture_runs_nothing_and_replay_keeps_the_edges() {
    let (script, gpu) = gpu();
    let main = gpu.stream();
    let graph = capture_fork_join(&gpu, &main);
    assert_eq!(script.running(), [] as [u8; 0]);
    assert_eq!(gpu.captures(), 1);
    for finish_first in [b'B', b'C'] {
        gpu.replay(&graph, &main).unwrap();
        launch(&gpu, &main, b'z');
        assert_eq!(script.running(), *b"A");
        script.finish(b'A');
        assert_eq!(script.running(), *b"BC");
        script.finish(finish_first);
        assert_eq!(script.running().len(), 1);
        script.finish(b'B' ^ b'C' ^ finish_first);
        assert_eq!(script.running(), *b"D");
        script.finish(b'D');
        assert_eq!(script.running(), *b"z");
        script.finish(b'z');
        gpu.synchronize(&main).unwrap();
    }
    assert_eq!(gpu.captures(), 1);
}

#[test]
fn a_graph_replays_on_any_stream_and_many_times_in_a_row() {
    let (script, gpu) = gpu();
    let graph = capture_fork_join(&gpu, &gpu.stream());
    let other = gpu.stream();
    for _ in 0..100 {
        gpu.replay(&graph, &other).unwrap();
    }
    drop(graph);
    let mut finished = Vec::new();
    while let Some(&tag) = script.running().first() {
        finished.push(tag);
        script.finish(tag);
    }
    assert_eq!(finished, b"ABCD".repeat(100));
}

#[test]
fn an_empty_graph_is_done_at_once() {
    let (_script, gpu) = gpu();
    let stream = gpu.stream();
    gpu.begin_capture(&stream).unwrap();
    let graph = gpu.end_capture(&stream).unwrap();
    gpu.replay(&graph, &stream).unwrap();
    gpu.synchronize(&stream).unwrap();
}

#[test]
fn what_needs_work_to_run_is_refused_during_capture() {
    let (_script, gpu) = gpu();
    let (main, side) = (gpu.stream(), gpu.stream());
    let outside = gpu.event();
    gpu.record(&outside, &side).unwrap();
    gpu.begin_capture(&main).unwrap();
    assert_eq!(gpu.synchronize(&main), Err(CaptureError::NotWhileCapturing.into()));
    assert_eq!(gpu.wait(&outside, &main), Err(CaptureError::ForeignEvent.into()));
    let graph = gpu.end_capture(&main).unwrap();
    gpu.begin_capture(&main).unwrap();
    assert_eq!(gpu.replay(&graph, &main), Err(CaptureError::NotWhileCapturing.into()));
}

#[test]
fn a_failed_launch_is_reported_once_and_the_stream_goes_on() {
    let (script, gpu) = gpu();
    let (a, b) = (gpu.stream(), gpu.stream());
    let event = gpu.event();
    script.refuse.lock().push(7);
    launch(&gpu, &a, 7);
    launch(&gpu, &a, 8);
    gpu.record(&event, &a).unwrap();
    gpu.wait(&event, &b).unwrap();
    launch(&gpu, &b, 9);
    assert_eq!(script.running(), [9], "8 is skipped, the waiting stream is not held up");
    assert_eq!(gpu.synchronize(&a), Err(PoolError::NoMemory.into()));
    assert_eq!(gpu.synchronize(&a), Ok(()));
    launch(&gpu, &a, 1);
    assert_eq!(script.running(), [9, 1]);
    script.finish_all();
}

#[test]
fn a_failed_node_ends_its_graph() {
    let (script, gpu) = gpu();
    let main = gpu.stream();
    let graph = capture_fork_join(&gpu, &main);
    script.refuse.lock().push(b'B');
    gpu.replay(&graph, &main).unwrap();
    script.finish(b'A');
    assert_eq!(script.running(), *b"C");
    script.finish(b'C');
    assert_eq!(script.running(), [] as [u8; 0], "D is skipped");
    assert_eq!(gpu.synchronize(&main), Err(PoolError::NoMemory.into()));
}

#[test]
fn launches_out_of_range_are_refused_and_nothing_is_queued() {
    let (script, gpu) = gpu();
    let stream = gpu.stream();
    let refused = |field, value, max| Err(GpuError::OutOfRange { field, value, min: 1, max });
    assert_eq!(try_launch(&gpu, &stream, &[], 1, 1), refused(GpuField::ArgsLen, 0, 4096));
    assert_eq!(try_launch(&gpu, &stream, &[0; 4097], 1, 1), refused(GpuField::ArgsLen, 4097, 4096));
    assert_eq!(try_launch(&gpu, &stream, &[0], 1, 0), refused(GpuField::WarpsPerBlock, 0, 32));
    assert_eq!(try_launch(&gpu, &stream, &[0], 1, 33), refused(GpuField::WarpsPerBlock, 33, 32));
    assert_eq!(try_launch(&gpu, &stream, &[0], 0, 8), refused(GpuField::Blocks, 0, 128));
    assert_eq!(try_launch(&gpu, &stream, &[0], 129, 8), refused(GpuField::Blocks, 129, 128));
    assert_eq!(gpu.max_coresident_blocks(0), 0);
    assert!(script.running().is_empty());
}

#[test]
fn a_full_queue_is_refused() {
    let (script, gpu) = gpu();
    let stream = gpu.stream();
    launch(&gpu, &stream, 0);
    for _ in 0..STREAM_QUEUE_MAX {
        launch(&gpu, &stream, 1);
    }
    let full = GpuError::QueueFull { queued: STREAM_QUEUE_MAX, limit: STREAM_QUEUE_MAX };
    assert_eq!(try_launch(&gpu, &stream, &[2], 1, 1), Err(full.clone()));
    assert_eq!(gpu.record(&gpu.event(), &stream), Err(full));
    script.finish(0);
    launch(&gpu, &stream, 2);
    script.finish_all();
}

#[test]
fn handles_of_another_gpu_are_refused() {
    let (_script, gpu) = gpu();
    let (_other_script, other) = self::gpu();
    let foreign = |handle| Err(GpuError::ForeignHandle { handle });
    let (stream, event) = (other.stream(), other.event());
    other.begin_capture(&stream).unwrap();
    let graph = other.end_capture(&stream).unwrap();
    assert_eq!(try_launch(&gpu, &stream, &[0], 1, 1), foreign(HandleKind::Stream));
    assert_eq!(gpu.synchronize(&stream), foreign(HandleKind::Stream));
    assert_eq!(gpu.begin_capture(&stream), foreign(HandleKind::Stream));
    assert_eq!(gpu.record(&event, &gpu.stream()), foreign(HandleKind::Event));
    assert_eq!(gpu.wait(&event, &gpu.stream()), foreign(HandleKind::Event));
    assert_eq!(gpu.replay(&graph, &gpu.stream()), foreign(HandleKind::Graph));
}

#[test]
fn dropped_memory_stays_until_queued_work_has_finished() {
    let (script, gpu) = gpu();
    let stream = gpu.stream();
    let memory = gpu.alloc(100, 8).unwrap();
    launch(&gpu, &stream, 1);
    launch(&gpu, &stream, 2);
    drop(memory);
    assert_eq!(gpu.device.allocations.num_retired(), 1);
    script.finish(1);
    assert_eq!(gpu.device.allocations.num_retired(), 1);
    script.finish(2);
    assert_eq!(gpu.device.allocations.num_retired(), 0);
    drop(gpu.alloc(100, 8).unwrap());
    assert_eq!(gpu.device.allocations.num_retired(), 0);
}

#[test]
fn memory_is_written_and_read_through_the_seam() {
    let (_script, gpu) = gpu();
    let memory = gpu.alloc_pinned(32, 16).unwrap();
    assert_eq!((memory.len(), memory.addr() % 16), (32, 0));
    gpu.fill(memory.addr(), 0xff, 32).unwrap();
    gpu.write(memory.addr() + 8, &7u64.to_ne_bytes()).unwrap();
    assert_eq!(gpu.load_u64(memory.addr() + 8), Ok(7));
    gpu.store_u32(memory.addr(), 5).unwrap();
    let mut bytes = [0; 12];
    gpu.read(memory.addr(), &mut bytes).unwrap();
    assert_eq!(bytes, [5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 7, 0, 0, 0]);
}

#[test]
fn synchronize_blocks_until_the_last_launch_ends() {
    let (script, gpu) = gpu();
    let stream = gpu.stream();
    for tag in 0..50 {
        launch(&gpu, &stream, tag);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| script.finish_all());
        gpu.synchronize(&stream).unwrap();
        assert!(script.running().is_empty());
    });
}

#[test]
fn a_dropped_stream_finishes_its_work_and_its_place_is_reused() {
    let (script, gpu) = gpu();
    let stream = gpu.stream();
    launch(&gpu, &stream, 1);
    launch(&gpu, &stream, 2);
    drop(stream);
    let second = gpu.stream();
    launch(&gpu, &second, 3);
    assert_eq!(script.running(), [1, 3]);
    script.finish_all();
    let third = gpu.stream();
    assert_eq!(gpu.stream_idx(&third), Ok(StreamIdx(0)));
}

#[test]
fn dropping_a_gpu_forgets_queued_work_and_outlives_its_handles() {
    let (script, gpu) = gpu();
    let (stream, blocked) = (gpu.stream(), gpu.stream());
    let event = gpu.event();
    launch(&gpu, &stream, 1);
    launch(&gpu, &stream, 2);
    gpu.record(&event, &stream).unwrap();
    gpu.wait(&event, &blocked).unwrap();
    launch(&gpu, &blocked, 3);
    let memory = gpu.alloc(8, 8).unwrap();
    let (device, idx) = (Arc::clone(&gpu.device), gpu.stream_idx(&stream).unwrap());
    std::thread::scope(|scope| {
        let dropping = scope.spawn(move || drop(gpu));
        // The drop has forgotten the queues once it has marked them as stopped.
        while device.queues.lock().error(idx).is_none() {
            std::thread::yield_now();
        }
        script.finish(1);
        dropping.join().unwrap();
    });
    assert!(script.running().is_empty(), "2 and 3 never start");
    drop((memory, stream, blocked, event, device));
    assert_eq!(Arc::strong_count(&script), 1, "nothing keeps the device alive");
}

#[test]
fn dropping_a_gpu_gives_up_on_a_kernel_that_does_not_end_and_keeps_its_memory() {
    let (script, gpu) = gpu();
    let stream = gpu.stream();
    let memory = gpu.alloc(8, 8).unwrap();
    launch(&gpu, &stream, 1);
    let device = Arc::downgrade(&gpu.device);
    drop((memory, gpu, stream));
    assert!(device.upgrade().is_some_and(|device| device.allocations.num_retired() == 1));
    script.finish(1);
    assert!(device.upgrade().is_none());
}

#[test]
fn shared_memory_can_be_exported_and_private_memory_cannot() {
    use ibex_hca::shared_memory::{PeerAccess, PeerRegion, SharedMemoryError};
    let pool = Arc::new(Pool::new(PoolConfig::simulation(1)).unwrap());
    let shared = HostGpu::shared(Arc::clone(&pool), 0);
    let memory = shared.alloc(3 << 20, 4096).unwrap();
    shared.write(memory.addr() + 8192, b"seen from elsewhere").unwrap();
    let handle = shared.export(memory.addr() + 8192, 4096).unwrap();
    // As another process would.
    let elsewhere = PeerRegion::open(&handle, PeerAccess::ReadWrite).unwrap();
    assert_eq!(elsewhere.view().unwrap().to_vec(0, 19), b"seen from elsewhere");
    elsewhere.view().unwrap().write(0, b"S");
    let mut byte = [0];
    shared.read(memory.addr() + 8192, &mut byte).unwrap();
    assert_eq!(&byte, b"S");
    let imported = shared.import(&handle).unwrap();
    assert_eq!(imported.len(), 4096);
    assert!(shared.allocated_bytes() == 3 << 20, "what is imported is not allocated here");

    let beyond = shared.export(memory.addr(), (3 << 20) + 1);
    assert!(matches!(beyond, Err(GpuError::Shared(SharedMemoryError::NotShared { .. }))), "{beyond:?}");
    let private = HostGpu::new(pool, 0);
    let memory = private.alloc(4096, 4096).unwrap();
    let refused = private.export(memory.addr(), 4096);
    assert!(matches!(refused, Err(GpuError::Shared(SharedMemoryError::NotShared { .. }))), "{refused:?}");
    let refused = private.import(b"no handle").map(|memory| memory.len());
    assert!(matches!(refused, Err(GpuError::Shared(SharedMemoryError::Malformed { .. }))), "{refused:?}");
}
