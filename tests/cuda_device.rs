//! The same on a real GPU: the kernels' self-test, and groups of ranks that share it. Without one, every test skips.
//!
//! `benches/gpu.sh` carries this binary to a machine that has one.
#![expect(unsafe_code, reason = "launches hand addresses to kernels")]
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use core::num::NonZeroU32;
use std::sync::Arc;

use ibex::gpu::pool::{Pool, PoolConfig};
use ibex::gpu::{CudaGpu, CudaMemory, CudaOptions, Gpu, HostGpu, KernelId, Launch};

#[path = "cuda/gang.rs"]
mod gang;
#[path = "cuda/group.rs"]
mod group;
mod rig;

/// Ranks that share the GPU.
const RANKS: u32 = 3;

/// The GPU of this machine, opened `count` times, or why there is none.
fn open(memory: CudaMemory, count: u32) -> Option<Vec<Arc<dyn Gpu>>> {
    let ranks_per_device = NonZeroU32::new(count).unwrap();
    let options = CudaOptions { ranks_per_device, memory, ..CudaOptions::default() };
    let opened: Result<Vec<_>, _> = (0..count).map(|_| CudaGpu::open(&options)).collect();
    match opened {
        Ok(gpus) => Some(gpus.into_iter().map(|gpu| Arc::new(gpu) as Arc<dyn Gpu>).collect()),
        Err(error) => {
            rig::say_skipped(&format!(
                "no GPU to run on: {error} (benches/gpu.sh carries this to a machine with one)"
            ));
            None
        }
    }
}

/// Words of results per warp (`kSelftestWords`).
const WORDS: usize = 64;
/// Word of the results that tells of a clock, which two machines read differently.
const CLOCK_WORD: usize = 20;
const BLOCKS: u32 = 3;
const WARPS: u32 = 4;
/// 16-byte units that each warp copies.
const N16: u32 = 75;

/// What the self-test kernel leaves: results of every warp, counters, and the copied bytes.
fn selftest(gpu: &dyn Gpu) -> [Vec<u8>; 4] {
    let warps = (BLOCKS * WARPS) as usize;
    let bytes = warps * N16 as usize * 16;
    let lens = [warps * WORDS * 4, 8 * 4, 4 * 8, bytes, bytes];
    let memory = lens.map(|len| gpu.alloc(len, 64).unwrap());
    let source: Vec<u8> = (0..bytes).map(|at| (at * 7 % 251) as u8).collect();
    gpu.write(memory[3].addr(), &source).unwrap();
    let mut args: Vec<u8> = memory.iter().flat_map(|block| block.addr().to_ne_bytes()).collect();
    args.extend([N16, 0].iter().flat_map(|word| word.to_ne_bytes()));
    let launch = Launch { kernel: KernelId::Selftest, args: &args, blocks: BLOCKS, warps_per_block: WARPS };
    let stream = gpu.stream();
    // SAFETY: the bytes are `SelftestArgs`, and all memory lives until the stream is empty.
    unsafe { gpu.launch(&stream, &launch) }.unwrap();
    gpu.synchronize(&stream).unwrap();
    [0, 1, 2, 4].map(|which: usize| {
        let mut bytes = vec![0; lens[which]];
        gpu.read(memory[which].addr(), &mut bytes).unwrap();
        bytes
    })
}

#[test]
fn the_selftest_leaves_the_same_bytes_as_on_the_host() {
    let host = HostGpu::new(Arc::new(Pool::new(PoolConfig::real_time(1)).unwrap()), 0);
    for memory in [CudaMemory::Device, CudaMemory::HostMapped] {
        let Some(gpus) = open(memory, 1) else { return };
        let [mut here, mut there] = [selftest(&host), selftest(&*gpus[0])];
        for results in [&mut here, &mut there] {
            for warp in results[0].chunks_exact_mut(WORDS * 4) {
                warp[CLOCK_WORD * 4..][..4].fill(0);
            }
        }
        assert_eq!(here, there);
    }
}

#[test]
fn ranks_that_share_the_gpu_dispatch_combine_and_replace_a_peer() {
    for config in group::modes(&group::config(RANKS)) {
        let Some(gpus) = open(CudaMemory::HostMapped, RANKS) else { return };
        group::run(&group::rig(&config, gpus));
    }
}

/// What compute-sanitizer can look at: one launch at a time, of all ranks.
#[test]
fn all_ranks_in_one_launch_dispatch_and_combine() {
    for config in group::modes(&group::config(RANKS)) {
        let Some(gpus) = open(CudaMemory::HostMapped, 1) else { return };
        let gpu = gpus.into_iter().next().unwrap();
        group::run_eager(&group::rig(&config, gang::gang(gpu, RANKS as usize)));
    }
}
