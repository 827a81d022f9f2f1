//! `kernels/host/pool.h`, declaration by declaration.
//!
//! Owns nothing. The size of each structure is asserted below against the C++ side's, which asserts the same.

use core::ffi::{c_char, c_void};

pub(super) const MODE_REAL_TIME: u32 = 0;
pub(super) const MODE_SIMULATION: u32 = 1;

pub(super) const OK: u32 = 0;
pub(super) const SHUT_DOWN: u32 = 5;
pub(super) const NO_MEMORY: u32 = 6;
pub(super) const STUCK: u32 = 7;
pub(super) const LIVELOCK: u32 = 8;

pub(super) const PROGRESS_WORKED: u64 = 0;
pub(super) const PROGRESS_IDLE: u64 = u64::MAX;

/// `ibex_pool`: opaque.
#[repr(C)]
pub(super) struct Pool {
    _opaque: [u8; 0],
}

/// `ibex_pool_config`.
#[repr(C)]
pub(super) struct PoolConfig {
    pub(super) num_workers: u32,
    pub(super) mode: u32,
    pub(super) seed: u64,
    pub(super) progress: Option<extern "C" fn(*mut c_void, u32, u64, u64) -> u64>,
    pub(super) progress_ctx: *mut c_void,
    pub(super) stack_len: usize,
    pub(super) stuck_after_ns: u64,
    pub(super) steps_max: u64,
}
const _: () = assert!(size_of::<PoolConfig>() == 56);

/// `ibex_launch`.
#[repr(C)]
pub(super) struct Launch {
    pub(super) kernel_id: u32,
    pub(super) device: u32,
    pub(super) num_blocks: u32,
    pub(super) warps_per_block: u32,
    pub(super) args: *const c_void,
    pub(super) args_len: usize,
    pub(super) on_done: Option<extern "C" fn(*mut c_void, bool)>,
    pub(super) done_ctx: *mut c_void,
}
const _: () = assert!(size_of::<Launch>() == 48);

/// `ibex_pool_stats`.
#[derive(Default)]
#[repr(C)]
pub(super) struct PoolStats {
    pub(super) launches: u64,
    pub(super) switches: u64,
    pub(super) stalls: u64,
    pub(super) progress_calls: u64,
    pub(super) stacks: u64,
    pub(super) schedule_hash: u64,
    pub(super) events: u64,
}
const _: () = assert!(size_of::<PoolStats>() == 56);

unsafe extern "C" {
    pub(super) fn ibex_pool_create(config: *const PoolConfig, status: *mut u32) -> *mut Pool;
    pub(super) fn ibex_pool_shutdown(pool: *mut Pool);
    pub(super) fn ibex_pool_destroy(pool: *mut Pool);
    pub(super) fn ibex_pool_worker(pool: *mut Pool, worker: u32);
    pub(super) fn ibex_pool_launch(pool: *mut Pool, launch: *const Launch) -> u32;
    pub(super) fn ibex_pool_simulate(
        pool: *mut Pool,
        until: extern "C" fn(*mut c_void) -> bool,
        ctx: *mut c_void,
    ) -> u32;
    pub(super) fn ibex_pool_kill(pool: *mut Pool, device: u32) -> u32;
    pub(super) fn ibex_pool_freeze(pool: *mut Pool, device: u32, frozen: bool) -> u32;
    pub(super) fn ibex_pool_now_ns(pool: *const Pool) -> u64;
    pub(super) fn ibex_pool_get_stats(pool: *const Pool, stats: *mut PoolStats);
    pub(super) fn ibex_kernel_name(kernel_id: u32) -> *const c_char;
    pub(super) fn ibex_kernel_args_len(kernel_id: u32) -> u32;
    pub(super) fn ibex_kernel_threads_max(kernel_id: u32) -> u32;
}
