//! `CudaGpu` on a double of the CUDA driver: sequences of calls, every one of them failing in turn, nothing leaked.
//!
//! The double (`cuda/driver.cpp`) is loaded as a driver is, works on host memory, and counts what lives. It judges how
//! the driver is called; of kernels on a GPU it says nothing.
#![expect(unsafe_code, reason = "launches hand addresses to kernels")]
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use core::time::Duration;
use std::sync::{Arc, Barrier};

use ibex::config::{Config, Link, RoutePolicy};
use ibex::gpu::cuda::{CudaError, Uuid};
use ibex::gpu::pool::{Pool, PoolConfig};
use ibex::gpu::{
    CaptureError, CudaGpu, CudaMemory, CudaOptions, CudaSharing, DeviceMemory, Gpu, GpuError, GpuField,
    HostGpu, KernelId, Launch, Reachable, Stream,
};
use ibex::harness::post::{PostCase, PostRig};
use ibex::harness::{RigRank, StepPlan};
use ibex::ids::Rank;
use ibex::reference::check::Step;
use ibex::reference::inputs::{InputKey, RankInput};
use ibex::reference::routing::Routing;
use ibex::session::{ElasticMember, ElasticOptions, Gpus, GroupName, MemberOptions, TopkDtype};
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::url::StoreUrl;

use ibex_hca::control_region::RegionPlace;

#[path = "cuda/double.rs"]
mod double;
#[path = "cuda/gang.rs"]
mod gang;
#[path = "cuda/group.rs"]
mod group;

use double::Double;
use ibex::gpu::NicWay;

/// Far longer than anything takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(120);
/// Out of memory, as the driver says it.
const FAILED: i32 = 2;

fn open(double: &Double, memory: CudaMemory) -> CudaGpu {
    CudaGpu::open(&double.options(memory, 1)).unwrap()
}

/// The empty kernel: every warp adds one to a word.
fn count(gpu: &CudaGpu, stream: &Stream, counter: &DeviceMemory, blocks: u32) -> Result<(), GpuError> {
    let args = counter.addr().to_ne_bytes();
    let launch = Launch { kernel: KernelId::SelftestEmpty, args: &args, blocks, warps_per_block: 2 };
    // SAFETY: the bytes are `SelftestEmptyArgs`; every test keeps the counter until its stream is empty.
    unsafe { gpu.launch(stream, &launch) }
}

fn refused(double: &Double, options: &CudaOptions) -> CudaError {
    let error = match CudaGpu::open(options) {
        Ok(_) => panic!("a machine that cannot run kernels was accepted"),
        Err(error) => error,
    };
    assert_eq!(double.live(), 0, "{error}: something stayed behind");
    error
}

#[test]
fn machines_that_cannot_run_kernels_are_refused_with_the_reason() {
    let double = Double::new("unfit");
    let options = double.options(CudaMemory::Device, 1);

    let nowhere = CudaOptions { library: "libibex-is-not-there.so.1".into(), ..options.clone() };
    let error = refused(&double, &nowhere);
    assert!(matches!(error, CudaError::NotFound { .. }), "{error}");
    assert!(error.to_string().contains("libibex-is-not-there"), "{error}");

    let old = Double::old("old");
    let error = refused(&old, &old.options(CudaMemory::Device, 1));
    assert!(matches!(error, CudaError::TooOld { .. }), "{error}");
    assert!(error.to_string().contains("cuLaunchCooperativeKernel"), "{error}");

    double.machine(11_040, 1, 9, -1);
    let error = refused(&double, &options);
    assert!(matches!(error, CudaError::TooOldDriver { found: (11, 4) }), "{error}");
    double.machine(13_000, 0, 9, -1);
    let error = refused(&double, &options);
    assert_eq!(error.to_string(), "there is no gpu, the driver has 0");
    double.machine(13_000, 1, 7, -1);
    let error = refused(&double, &options);
    assert_eq!(error.to_string(), "double 0 has compute capability 7, at least 8 is needed");
    for (attribute, what) in
        [(95, "cooperative launches"), (41, "unified addressing"), (19, "mapped host memory")]
    {
        double.machine(13_000, 1, 9, attribute);
        let error = refused(&double, &options);
        assert!(
            matches!(&error, CudaError::Unfit { what: found, value: 0, min: 1, .. } if *found == what),
            "{error}"
        );
    }
    double.machine(13_000, 1, 9, -1);
    let error = refused(&double, &CudaOptions { image: &[], ..options });
    assert!(matches!(error, CudaError::NoImage), "{error}");
}

#[test]
fn a_device_is_chosen_by_what_it_is_and_not_by_its_place() {
    let double = Double::new("uuid");
    let options = double.options(CudaMemory::Device, 1);
    let second = CudaGpu::open(&CudaOptions { uuid: Some([0x11; 16]), ..options.clone() }).unwrap();
    assert_eq!((second.info().name.as_str(), second.info().pci.as_str()), ("double 1", "0000:1a:00.0"));
    assert_eq!(second.info().write_ordering, Some(100));
    drop(second);
    let error = refused(&double, &CudaOptions { uuid: Some([0x77; 16]), ..options });
    assert!(matches!(error, CudaError::NoDevice { wanted: Some(_), found: 2 }), "{error}");
    let uuid = "GPU-77777777-7777-7777-7777-777777777777";
    assert!(error.to_string().contains(uuid), "{error}");
    assert_eq!(Uuid([0x77; 16]).to_string(), uuid);
}

/// Allocates, fills, shares and maps memory whose pages have descriptors; whether a NIC reaches it by dma-buf.
fn use_descriptors(double: &Double) -> Result<bool, Box<dyn std::error::Error>> {
    let sharing = CudaSharing::Descriptor;
    let gpu = CudaGpu::open(&CudaOptions { sharing, ..double.options(CudaMemory::Device, 1) })?;
    let memory = gpu.alloc(70_000, 4096)?;
    gpu.write(memory.addr() + 8192, b"over there")?;
    let mapped = gpu.import(&gpu.export(memory.addr() + 8192, 4096)?)?;
    assert!(mapped.addr() != memory.addr() + 8192 && mapped.len() == 4096);
    // SAFETY: memory of the double is memory of this process.
    let seen = unsafe { std::slice::from_raw_parts(mapped.addr() as *const u8, 11) };
    assert_eq!(seen, b"over there\0", "the same pages, which came zeroed");
    let ways = gpu.nic_ways(memory.addr(), true)?.ways;
    double.fail(0, 0);
    assert!(matches!(ways.last(), Some(NicWay::Address)));
    Ok(matches!(ways[..], [NicWay::DmaBuf(_), NicWay::Address]))
}

#[test]
fn memory_is_shared_by_descriptors_and_every_call_that_fails_leaves_nothing() {
    let double = Double::new("descriptors");
    assert!(use_descriptors(&double).unwrap());
    assert_eq!(double.live(), 0, "a run without failures leaves nothing");
    let calls = double.calls();
    let mut told = Vec::new();
    for nth in 1..=calls.len() as u64 {
        double.fail(nth, FAILED);
        told.extend(use_descriptors(&double).err().map(|error| error.to_string()));
        assert_eq!(double.live(), 0, "call {nth}: something stayed behind");
    }
    for name in [
        "Create",
        "AddressReserve",
        "Map",
        "SetAccess",
        "ExportToShareableHandle",
        "ImportFromShareableHandle",
        "GetAllocationGranularity",
    ] {
        let name = format!("cuMem{name} failed");
        assert!(told.iter().any(|error| error.starts_with(&name)), "{name}: {told:?}");
    }
    let sharing = CudaSharing::Descriptor;
    for attribute in [102, 103, 110] {
        double.machine(13_000, 1, 9, attribute);
        let options = double.options(CudaMemory::Device, 1);
        let error = refused(&double, &CudaOptions { sharing, ..options.clone() });
        assert!(matches!(error, CudaError::Unfit { value: 0, min: 1, .. }), "{error}");
        drop(CudaGpu::open(&options).unwrap());
    }
}

#[test]
fn what_another_process_says_of_its_memory_is_not_believed() {
    let double = Double::new("strangers");
    let sharing = CudaSharing::Descriptor;
    let gpu = CudaGpu::open(&CudaOptions { sharing, ..double.options(CudaMemory::Device, 1) }).unwrap();
    let memory = gpu.alloc(4096, 4096).unwrap();
    let before = double.live();
    let good = gpu.export(memory.addr(), 4096).unwrap();
    let with = |at: usize, value: u64| {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        gpu.import(&bytes).map(drop).unwrap_err()
    };
    // Beyond the pages, pages that are longer than they are, another time of start.
    for error in [with(24, 1 << 20), with(32, 1 << 20), with(56, 1)] {
        assert!(matches!(error, GpuError::Shared(_)), "{error}");
    }
    assert!(matches!(with(40, 1 << 20), GpuError::Cuda(_)));
    assert!(matches!(with(8, 0x7777), GpuError::NoPeerAccess { .. }));
    assert_eq!(double.live(), before);
    drop(gpu.import(&good).unwrap());
    drop((memory, gpu));
    assert_eq!(double.live(), 0);
}

/// Uses everything once. What it made is given back when it returns, so on success it disarms the double first.
fn use_everything(double: &Double) -> Result<(), Box<dyn std::error::Error>> {
    let gpu = CudaGpu::open(&double.options(CudaMemory::Device, 1))?;
    let memory = gpu.alloc(8192, 4096)?;
    let pinned = gpu.alloc_pinned(64, 64)?;
    gpu.write(memory.addr(), &[1; 100])?;
    gpu.read(memory.addr(), &mut [0; 100])?;
    gpu.fill(memory.addr(), 7, 8192)?;
    gpu.store_u64(memory.addr(), 1)?;
    gpu.load_u64(memory.addr())?;
    let page = ibex_hca::host_memory::HostMemory::new(4096)?;
    // SAFETY: the page lives longer than its reach.
    let reach = unsafe { gpu.reach(page.view().addr(0) + 0x800, 8, Reachable::Registers) }?;
    assert_eq!(reach.addr(), page.view().addr(0) + 0x800);
    let (stream, side) = (gpu.stream(), gpu.stream());
    let (fork, join) = (gpu.event(), gpu.event());
    count(&gpu, &stream, &pinned, 3)?;
    gpu.record(&fork, &stream)?;
    gpu.record(&join, &stream)?;
    gpu.query(&fork)?;
    gpu.elapsed_ns(&fork, &join)?;
    gpu.begin_capture(&stream)?;
    gpu.record(&fork, &stream)?;
    gpu.wait(&fork, &side)?;
    count(&gpu, &side, &pinned, 1)?;
    gpu.record(&join, &side)?;
    gpu.wait(&join, &stream)?;
    let graph = gpu.end_capture(&stream)?;
    gpu.replay(&graph, &stream)?;
    gpu.synchronize(&stream)?;
    let handle = gpu.export(memory.addr() + 4096, 4096)?;
    let mapped = gpu.import(&handle)?;
    assert_eq!((mapped.addr(), mapped.len()), (memory.addr() + 4096, 4096));
    gpu.dma_buf(memory.addr(), 8192)?;
    match gpu.nic_ways(memory.addr(), true) {
        // A driver that does not answer is one that does not know.
        Err(GpuError::UnorderedWrites { found: None, .. }) => {}
        ways => assert!(!ways?.ways.is_empty()),
    }
    let gate = gpu.gate()?;
    gate.hold(&gpu, &stream)?;
    gate.open()?;
    // The events of the double are 1.5 ms apart, whatever lies between them.
    assert_eq!(gpu.copies().measure_ns(&[0, 4096, 100])?, 1_500_000);
    double.fail(0, 0);
    Ok(())
}

#[test]
fn every_call_that_fails_is_a_typed_error_and_nothing_stays() {
    let double = Double::new("failing");
    use_everything(&double).unwrap();
    assert_eq!(double.live(), 0, "a run without failures leaves nothing");
    let calls = double.calls();
    let mut told = Vec::new();
    for nth in 1.. {
        double.fail(nth, FAILED);
        let result = use_everything(&double);
        assert_eq!(double.live(), 0, "call {nth}: something stayed behind");
        match result {
            Ok(()) => {
                // What fails in taking things back, or asked only for a description, disturbs nobody.
                if nth > calls.len() as u64 {
                    break;
                }
            }
            Err(error) => {
                assert!(error.to_string().contains("CUDA error 2 (out of memory)"), "call {nth}: {error}");
                told.push(error.to_string());
            }
        }
    }
    // Every kind of call was seen to fail, but for those that take back or describe.
    for name in calls.iter().filter(|name| !is_quiet(name)) {
        assert!(told.iter().any(|error| error.starts_with(&format!("{name} "))), "{name} never failed");
    }
}

/// Calls whose failure is nobody's error: what is being given back, and facts that a driver may not know.
fn is_quiet(name: &str) -> bool {
    ["Release", "Destroy", "Unload", "Free", "Unregister", "Close", "cuCtxPop", "cuStreamQuery"]
        .iter()
        .any(|part| name.contains(part))
}

#[test]
fn memory_is_reached_by_copies_on_the_device_and_by_the_processor_on_the_host() {
    for memory in [CudaMemory::Device, CudaMemory::HostMapped] {
        let double = Double::new(&format!("memory-{memory:?}"));
        let gpu = open(&double, memory);
        let block = gpu.alloc(10_000, 4096).unwrap();
        assert!(block.addr().is_multiple_of(4096));
        let mut bytes = [1; 100];
        gpu.read(block.addr() + 9_900, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 100], "memory comes zeroed");
        gpu.write(block.addr() + 3, &[5; 9]).unwrap();
        gpu.fill(block.addr() + 4, 6, 7).unwrap();
        gpu.store_u32(block.addr() + 16, 0x0102_0304).unwrap();
        let mut bytes = [0; 20];
        gpu.read(block.addr(), &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0, 0, 5, 6, 6, 6, 6, 6, 6, 6, 5, 0, 0, 0, 0, 4, 3, 2, 1]);
        assert_eq!(gpu.load_u32(block.addr() + 16), Ok(0x0102_0304));
        gpu.store_u64(block.addr() + 24, u64::MAX - 1).unwrap();
        assert_eq!(gpu.load_u64(block.addr() + 24), Ok(u64::MAX - 1));
        let copies = double.calls().iter().filter(|name| name.starts_with("cuMemcpy")).count();
        assert_eq!(copies == 0, memory == CudaMemory::HostMapped);

        let beyond = GpuError::NotAllocated { addr: block.addr() + 9_999, len: 2 };
        assert_eq!(gpu.write(block.addr() + 9_999, &[0; 2]), Err(beyond));
        assert!(matches!(gpu.load_u32(block.addr() + 2), Err(GpuError::Misaligned { align: 4, .. })));
        assert!(matches!(gpu.alloc(0, 8), Err(GpuError::OutOfRange { field: GpuField::AllocLen, .. })));
        assert!(matches!(gpu.alloc(8, 24), Err(GpuError::BadAlignment { align: 24 })));
        assert_eq!(gpu.allocated_bytes(), 10_000);
        // Host memory has no handle that another process could open.
        assert_eq!(gpu.export(block.addr(), 8).is_ok(), memory == CudaMemory::Device);
        drop((block, gpu));
        assert_eq!(double.live(), 0);
    }
}

#[test]
fn memory_that_queued_work_may_name_is_given_back_when_the_work_is_done() {
    let double = Double::new("retired");
    let gpu = open(&double, CudaMemory::Device);
    let (stream, counter) = (gpu.stream(), gpu.alloc(4, 4).unwrap());
    let before = double.live();
    count(&gpu, &stream, &counter, 1).unwrap();
    double.set_busy(true);
    drop(counter);
    assert_eq!((double.live(), gpu.allocated_bytes()), (before, 0));
    drop(stream);
    assert_eq!(double.live(), before, "nor does its stream go before its work");
    double.set_busy(false);
    let next = gpu.stream();
    gpu.synchronize(&next).unwrap();
    assert_eq!(double.live(), before - 1, "the counter and its stream are gone, the next stream is there");
    drop((gpu, next));
    assert_eq!(double.live(), 0);
}

#[test]
fn a_grid_has_room_for_its_share_of_the_device() {
    let double = Double::new("share");
    let shares = |ranks| {
        let gpu = CudaGpu::open(&double.options(CudaMemory::Device, ranks)).unwrap();
        let (stream, counter) = (gpu.stream(), gpu.alloc(4, 4).unwrap());
        count(&gpu, &stream, &counter, gpu.max_coresident_blocks(2)).unwrap();
        let too_many = count(&gpu, &stream, &counter, gpu.max_coresident_blocks(2) + 1);
        assert!(
            matches!(too_many, Err(GpuError::OutOfRange { field: GpuField::Blocks, .. })),
            "{too_many:?}"
        );
        (gpu.max_coresident_blocks(32), gpu.max_coresident_blocks(2), gpu.max_coresident_blocks(33))
    };
    assert_eq!(shares(1), (64, 64 * 16, 0));
    assert_eq!(double.launches(), (1, 1), "a rank alone launches cooperatively");
    assert_eq!(shares(8), (8, 8 * 16, 0));
    assert_eq!(double.launches(), (2, 1), "ranks that share cannot ask for the whole device");
}

/// A GPU whose kernels run on the CPU.
fn running(name: &str) -> (Double, CudaGpu) {
    let pool = Arc::new(Pool::new(PoolConfig::real_time(2)).unwrap());
    let double = Double::new(name).run_kernels(HostGpu::new(pool, 0));
    let gpu = open(&double, CudaMemory::HostMapped);
    (double, gpu)
}

#[test]
fn streams_and_graphs_run_what_was_launched_in_its_order() {
    let (double, gpu) = running("graph");
    let (main, side) = (gpu.stream(), gpu.stream());
    let (fork, join) = (gpu.event(), gpu.event());
    let counter = gpu.alloc(4, 4).unwrap();
    gpu.begin_capture(&main).unwrap();
    gpu.record(&fork, &main).unwrap();
    gpu.wait(&fork, &side).unwrap();
    count(&gpu, &side, &counter, 1).unwrap();
    gpu.record(&join, &side).unwrap();
    count(&gpu, &main, &counter, 1).unwrap();
    gpu.wait(&join, &main).unwrap();
    count(&gpu, &main, &counter, 3).unwrap();
    let graph = gpu.end_capture(&main).unwrap();
    gpu.synchronize(&side).unwrap();
    assert_eq!(gpu.load_u32(counter.addr()), Ok(0), "capture runs nothing");
    for _ in 0..100 {
        gpu.replay(&graph, &main).unwrap();
    }
    gpu.synchronize(&main).unwrap();
    assert_eq!(gpu.load_u32(counter.addr()), Ok(100 * 10));
    assert_eq!(gpu.captured_args(&graph).unwrap(), vec![counter.addr().to_ne_bytes().to_vec(); 3]);
    assert_eq!(gpu.captures(), 1);
    drop((graph, main, side, fork, join, counter, gpu));
    assert_eq!(double.live(), 0);
}

#[test]
fn what_cannot_be_recorded_is_refused_as_on_the_host() {
    let (double, gpu) = running("capture");
    let (main, side, event) = (gpu.stream(), gpu.stream(), gpu.event());
    let counter = gpu.alloc(4, 4).unwrap();
    let refused = |result: Result<(), GpuError>| match result {
        Err(GpuError::Capture(error)) => error,
        other => panic!("{other:?}"),
    };
    let end = |stream| refused(gpu.end_capture(stream).map(|_| ()));
    assert_eq!(end(&main), CaptureError::NotCapturing);
    gpu.record(&event, &side).unwrap();
    gpu.begin_capture(&main).unwrap();
    assert_eq!(refused(gpu.begin_capture(&main)), CaptureError::AlreadyCapturing);
    assert_eq!(refused(gpu.wait(&event, &main)), CaptureError::ForeignEvent);
    assert_eq!(refused(gpu.synchronize(&main)), CaptureError::NotWhileCapturing);
    gpu.record(&event, &main).unwrap();
    assert_eq!(refused(gpu.query(&event).map(|_| ())), CaptureError::EventCaptured);
    gpu.wait(&event, &side).unwrap();
    count(&gpu, &side, &counter, 1).unwrap();
    assert_eq!(end(&side), CaptureError::NotTheOrigin);
    assert_eq!(end(&main), CaptureError::Unjoined { unjoined: 1 });
    assert!(!gpu.is_capturing(&main).unwrap() && !gpu.is_capturing(&side).unwrap());
    // A capture whose stream is dropped is discarded, and the next one starts afresh.
    gpu.begin_capture(&main).unwrap();
    drop(main);
    let other = HostGpu::new(Arc::new(Pool::new(PoolConfig::real_time(1)).unwrap()), 0);
    let foreign = gpu.synchronize(&other.stream());
    assert!(matches!(foreign, Err(GpuError::ForeignHandle { .. })), "{foreign:?}");
    drop((side, event, counter, gpu));
    assert_eq!(double.live(), 0);
}

#[test]
fn ranks_that_share_a_gpu_dispatch_combine_and_replace_a_peer_through_the_driver() {
    for config in group::modes(&group::config(3)) {
        let pool = Arc::new(Pool::new(PoolConfig::real_time(1)).unwrap());
        let double = Double::new("group").run_kernels(HostGpu::new(pool, 0));
        let options = double.options(CudaMemory::HostMapped, 3);
        let open = || Arc::new(CudaGpu::open(&options).unwrap()) as Arc<dyn Gpu>;
        let rig = group::rig(&config, (0..3).map(|_| open()).collect());
        group::run(&rig);
        drop(rig);
        assert_eq!(double.live(), 0, "{config:?}");
    }
}

#[test]
fn payload_stays_on_the_gpu_and_emulated_devices_reach_it_by_copies() {
    for config in group::modes(&group::config(3)) {
        let pool = Arc::new(Pool::new(PoolConfig::real_time(1)).unwrap());
        let double = Double::new("on-device").run_kernels(HostGpu::new(pool, 0));
        let options = double.options(CudaMemory::Device, 3);
        let open = || Arc::new(CudaGpu::open(&options).unwrap()) as Arc<dyn Gpu>;
        let rig = group::rig(&config, (0..3).map(|_| open()).collect());
        for session in rig.world().sessions() {
            let places = session.places();
            assert_eq!(places.queues.place, RegionPlace::HostMapped, "{}", places.queues);
            assert_eq!(places.payload.place, RegionPlace::GpuCopies, "{}", places.payload);
        }
        group::run(&rig);
        drop(rig);
        assert_eq!(double.live(), 0, "{config:?}");
    }
}

/// One of two ranks that have a GPU each, and meet in a store.
fn serve_on(gpu: Arc<dyn Gpu>, rank: u16, config: &Config, store: &Blocking, end: &Barrier) {
    let options = ElasticOptions {
        group: GroupName { cluster: "test".into(), group: "cuda".into() },
        rank: Rank(rank),
        initial: [0, 1].into_iter().map(Rank).collect(),
        takeover: false,
        flap_window: None,
        node: MemberOptions { gpus: Gpus::Given(vec![gpu]), ..MemberOptions::default() },
    };
    let member = ElasticMember::join(config, store, &options).unwrap();
    let session = member.session();
    let rig = RigRank {
        tensors: session.tensors().unwrap(),
        stream: session.stream(),
        session: Arc::clone(session),
    };
    assert!(member.wait_linked(PATIENCE).unwrap(), "{:?}", member.view());
    member.ready(rank.into());
    assert!(member.wait_open(PATIENCE).unwrap(), "{:?}", member.view());
    let input = |rank: u16| {
        let key = InputKey { seed: 3, iteration: 0, rank: Rank(rank) };
        RankInput::generate(session.config(), Routing::Uniform, key, 5)
    };
    let inputs = [0, 1].map(input);
    rig.load(&inputs[usize::from(rank)], TopkDtype::I32).unwrap();
    rig.launch(session.config().max_topk, &StepPlan::default()).unwrap();
    session.gpu().synchronize(&rig.stream).unwrap();
    let step = Step::new(session.config(), &inputs);
    let verdict = rig.check_combine(&step, &inputs[usize::from(rank)], &[true; 2]).unwrap();
    assert!(verdict.checked > 0);
    assert_eq!((verdict.wrong, verdict.lost), (0, 0), "rank {rank}: {verdict:?}");
    end.wait();
}

#[test]
fn ranks_in_processes_of_their_own_bring_a_gpu_each() {
    for (route, memory) in [
        (RoutePolicy::Auto, CudaMemory::Device),
        (RoutePolicy::Ibgda, CudaMemory::Device),
        (RoutePolicy::Ibgda, CudaMemory::HostMapped),
    ] {
        let config = Config { route, ..group::config(2) };
        let store = Blocking::open(&StoreUrl::Memory, Clock::system(), PATIENCE).unwrap();
        let end = Barrier::new(2);
        // Threads stand for processes.
        std::thread::scope(|scope| {
            for rank in [0, 1] {
                let (config, store, end) = (&config, &store, &end);
                scope.spawn(move || {
                    let pool = Arc::new(Pool::new(PoolConfig::real_time(1)).unwrap());
                    let double = Double::new("member").run_kernels(HostGpu::new(pool, 0));
                    let gpu = CudaGpu::open(&double.options(memory, 1)).unwrap();
                    serve_on(Arc::new(gpu), rank, config, store, end);
                    assert_eq!(double.live(), 0, "{route}, {memory:?}");
                });
            }
        });
    }
}

#[test]
fn streams_of_several_ranks_wait_for_one_gate_and_none_is_left_behind_it() {
    let double = Double::new("gate");
    let gpus = [0, 1].map(|_| open(&double, CudaMemory::Device));
    let streams = [gpus[0].stream(), gpus[1].stream()];
    let gate = gpus[0].gate().unwrap();
    assert_eq!(double.held(), 0, "it has been tried");
    for round in 0..3 {
        gate.hold(&gpus[0], &streams[0]).unwrap();
        gate.hold(&gpus[1], &streams[1]).unwrap();
        assert_eq!(double.held(), 2, "round {round}");
        gate.open().unwrap();
        assert_eq!(double.held(), 0, "round {round}");
    }
    let foreign = gate.hold(&gpus[0], &streams[1]);
    assert!(matches!(foreign, Err(GpuError::ForeignHandle { .. })), "{foreign:?}");
    gate.hold(&gpus[1], &streams[1]).unwrap();
    drop(gate);
    // Its word is given back when the stream has done all work, which it was let go on with.
    assert_eq!(double.held(), 0);
    drop((streams, gpus));
    assert_eq!(double.live(), 0);
}

#[test]
fn a_page_that_several_reach_is_registered_once() {
    let double = Double::new("page");
    let gpus = [0, 1].map(|_| open(&double, CudaMemory::Device));
    let page = ibex_hca::host_memory::HostMemory::new(4096).unwrap();
    let register = |gpu: &CudaGpu, offset: u64| {
        // SAFETY: the page lives longer than its reach.
        unsafe { gpu.reach(page.view().addr(offset), 8, Reachable::Registers) }.unwrap()
    };
    let before = double.live();
    let [one, other] = [register(&gpus[0], 0x800), register(&gpus[1], 0xa00)];
    assert_eq!((one.addr(), other.addr()), (page.view().addr(0x800), page.view().addr(0xa00)));
    assert_eq!(double.live(), before + 1);
    drop(one);
    assert_eq!(double.live(), before + 1);
    drop(other);
    assert_eq!(double.live(), before);
    drop(register(&gpus[1], 0x800));
    assert_eq!(double.live(), before);
}

#[test]
fn all_ranks_in_one_cooperative_launch_dispatch_and_combine() {
    for config in group::modes(&group::config(3)) {
        let pool = Arc::new(Pool::new(PoolConfig::real_time(1)).unwrap());
        let double = Double::new("gang").run_kernels(HostGpu::new(pool, 0));
        let gpu = open(&double, CudaMemory::HostMapped);
        let rig = group::rig(&config, gang::gang(Arc::new(gpu), 3));
        group::run_eager(&rig);
        // Three steps of dispatch, expert and combine, each of all ranks at once.
        assert_eq!(double.launches(), (9, 9), "{config:?}");
        drop(rig);
        assert_eq!(double.live(), 0, "{config:?}");
    }
}

#[test]
fn work_requests_are_posted_through_the_driver_to_devices_that_a_thread_steps() {
    let (double, gpu) = running("post");
    let case = PostCase { bytes: 100, inline: false, num_qps: 2, slots: 50, batch: 8, sq_depth_log: 4 };
    let mut rig = PostRig::with_gpu(Arc::new(gpu), case, Link::Roce, 1).unwrap();
    for _ in 0..3 {
        let round = rig.round().unwrap();
        assert_eq!((round.completed, round.wrong), (100, 0));
    }
    assert_eq!(rig.unrung_wqes(), 0);
    drop(rig);
    assert_eq!(double.live(), 0);
}

#[test]
fn another_librarys_context_and_stream_are_used_and_left_alone() {
    use std::ffi::c_void;
    let double = Double::new("lent");
    let options = double.options(CudaMemory::Device, 1);
    // SAFETY: cuda.h's signatures; the double is a driver as far as these calls go.
    let (context, stream) = unsafe {
        let library = libloading::Library::new(&options.library).unwrap();
        let retain: libloading::Symbol<'_, unsafe extern "C" fn(*mut *mut c_void, i32) -> i32> =
            library.get(b"cuDevicePrimaryCtxRetain").unwrap();
        let create: libloading::Symbol<'_, unsafe extern "C" fn(*mut *mut c_void, u32) -> i32> =
            library.get(b"cuStreamCreate").unwrap();
        let push: libloading::Symbol<'_, unsafe extern "C" fn(*mut c_void) -> i32> =
            library.get(b"cuCtxPushCurrent_v2").unwrap();
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        assert_eq!((retain(&mut context, 1), push(context), create(&mut stream, 1)), (0, 0, 0));
        (context, stream)
    };
    // SAFETY: both live until the double goes.
    let gpu = unsafe { CudaGpu::in_context(context, &options) }.unwrap();
    assert_eq!(gpu.info().name, "double 1", "the context says which device it is on");
    // SAFETY: as above.
    let adopted = unsafe { gpu.adopt_stream(stream) };
    assert_eq!(gpu.raw_stream(&adopted), Ok(stream));
    let counter = gpu.alloc(4, 4).unwrap();
    count(&gpu, &adopted, &counter, 1).unwrap();
    gpu.synchronize(&adopted).unwrap();
    drop((adopted, counter, gpu));
    assert_eq!(double.live(), 2, "the caller's context and stream, and nothing of ours");
}
