/// The C surface of the host SIMT runtime: a pool of workers that run kernels as fibers.
///
/// Real time: every worker is an OS thread that the caller brings (`ibex_pool_worker`). Simulation: no
/// threads; one seeded scheduler runs all fibers and the device's `progress` on the caller's thread
/// (`ibex_pool_simulate`).
///
/// Who owns what: the pool owns fibers, stacks, shared-memory arenas and a copy of each launch's arguments.
/// Memory that arguments point to is the caller's, and stays valid until the launch's `on_done` has been
/// called or the pool has been destroyed.
///
/// INVARIANT: all blocks of one device run on one worker, and every block of a launch is resident from the
/// start.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { IBEX_WORKERS_MAX = 256 };
enum { IBEX_ARGS_LEN_MAX = 4096 };
enum { IBEX_WARPS_PER_BLOCK_MAX = 32 };
/// Fibers alive on one worker; also the bound on its pooled stacks.
enum { IBEX_FIBERS_MAX = 16384 };
/// Shared memory of one block.
enum { IBEX_SHARED_MAX = 65536 };

typedef enum ibex_status {
  IBEX_OK = 0,
  IBEX_BAD_CONFIG = 1,      ///< a pool config field is out of range
  IBEX_UNKNOWN_KERNEL = 2,  ///< no kernel has this id
  IBEX_BAD_ARGS_LEN = 3,    ///< args_len is not the size of the kernel's arguments
  IBEX_BAD_GRID = 4,        ///< no blocks or warps, more warps than the kernel allows, too many fibers
  IBEX_SHUT_DOWN = 5,       ///< the pool no longer takes launches
  IBEX_NO_MEMORY = 6,       ///< the operating system refused memory for stacks
  IBEX_STUCK = 7,           ///< simulation: nothing moved for stuck_after_ns, or every fiber is at a barrier
  IBEX_LIVELOCK = 8,        ///< simulation: steps_max scheduling decisions without time moving
} ibex_status;

/// `progress` did something: fibers may have become able to move.
#define IBEX_PROGRESS_WORKED UINT64_C(0)
/// `progress` found nothing to do and waits for no deadline.
#define IBEX_PROGRESS_IDLE UINT64_MAX

/// Steps whatever the kernels wait for (the emulated device). Returns IBEX_PROGRESS_WORKED,
/// IBEX_PROGRESS_IDLE, or the time of its next deadline. Runs on the worker's own stack, never on a
/// fiber's; `random` is 0 in real time.
typedef uint64_t (*ibex_progress_fn)(void* ctx, uint32_t worker, uint64_t now_ns, uint64_t random);

typedef enum ibex_mode { IBEX_REAL_TIME = 0, IBEX_SIMULATION = 1 } ibex_mode;

typedef struct ibex_pool_config {
  uint32_t num_workers;     ///< 1..=IBEX_WORKERS_MAX; simulation: 1
  uint32_t mode;            ///< ibex_mode
  uint64_t seed;            ///< simulation only
  ibex_progress_fn progress;  ///< may be null
  void* progress_ctx;
  size_t stack_len;         ///< 0: 64 KiB; a guard page below each is extra
  uint64_t stuck_after_ns;  ///< 0: 30 s real (one report on stderr), 1000 s virtual (IBEX_STUCK)
  uint64_t steps_max;       ///< simulation; 0: 50 million decisions without time moving
} ibex_pool_config;

typedef struct ibex_launch {
  uint32_t kernel_id;
  uint32_t device;          ///< all its blocks run on worker `device % num_workers`
  uint32_t num_blocks;
  uint32_t warps_per_block;
  const void* args;         ///< copied before the call returns
  size_t args_len;
  /// Called exactly once: on the worker's thread when the last block has left, or with `finished` false
  /// when the pool is destroyed before that. May launch; may be null.
  void (*on_done)(void* ctx, bool finished);
  void* done_ctx;
} ibex_launch;

typedef struct ibex_pool_stats {
  uint64_t launches;
  uint64_t switches;        ///< from one fiber to another
  uint64_t stalls;          ///< polls that found nothing new and gave way
  uint64_t progress_calls;
  uint64_t stacks;          ///< stacks mapped, in use or pooled
  uint64_t schedule_hash;   ///< simulation: identical for identical schedules
  uint64_t events;          ///< simulation: changes that kernels made, and everything else that may wake them
} ibex_pool_stats;

#ifdef __cplusplus
// The twins stand in runtime/gpu/pool/ffi.rs.
static_assert(sizeof(ibex_pool_config) == 56 && sizeof(ibex_launch) == 48 && sizeof(ibex_pool_stats) == 56);
#endif

typedef struct ibex_pool ibex_pool;

/// Null if a config field is out of range or memory is exhausted; `*status` says which.
ibex_pool* ibex_pool_create(const ibex_pool_config* config, ibex_status* status);
/// Ends every worker: `ibex_pool_worker` returns soon, unfinished launches are abandoned where they are.
void ibex_pool_shutdown(ibex_pool* pool);
/// Frees the pool. The caller has shut it down and joined every thread that runs a worker.
void ibex_pool_destroy(ibex_pool* pool);
/// Real time: runs worker `worker` on the calling thread until shutdown. One thread per worker.
void ibex_pool_worker(ibex_pool* pool, uint32_t worker);
/// Queues a launch from any thread.
ibex_status ibex_pool_launch(ibex_pool* pool, const ibex_launch* launch);
/// Simulation: runs on the calling thread until `until(ctx)` holds (IBEX_OK), or nothing can move any more.
/// `until` is asked between steps. After IBEX_STUCK or IBEX_LIVELOCK a report of every fiber is on stderr.
ibex_status ibex_pool_simulate(ibex_pool* pool, bool (*until)(void*), void* ctx);
/// Simulation: ends a device at once, wherever its fibers stand. Its launches, queued or running, are abandoned:
/// none of them touches memory again, and each `on_done` is called with `finished` false before this returns.
/// On the thread that runs the simulation, never from a fiber.
ibex_status ibex_pool_kill(ibex_pool* pool, uint32_t device);
/// Simulation: from now on no fiber of the device runs (`frozen`), or they go on where they stood. As
/// `ibex_pool_kill`.
ibex_status ibex_pool_freeze(ibex_pool* pool, uint32_t device, bool frozen);
/// Monotonic time, or the simulation's clock.
uint64_t ibex_pool_now_ns(const ibex_pool* pool);
/// Sums over the workers; exact when no worker runs.
void ibex_pool_get_stats(const ibex_pool* pool, ibex_pool_stats* stats);

/// The kernels of this build, by id. Null or 0 where no kernel has it.
const char* ibex_kernel_name(uint32_t kernel_id);
uint32_t ibex_kernel_args_len(uint32_t kernel_id);
uint32_t ibex_kernel_threads_max(uint32_t kernel_id);

#ifdef __cplusplus
}
#endif
