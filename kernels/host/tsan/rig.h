/// A C++ process that runs kernels on lane fibers: launches for several devices, and cases by name.
///
/// ThreadSanitizer cannot follow Rust and C++ at once, so the races of the shipped kernels are judged here,
/// without Rust. The same process built by g++ without the sanitizer is the lane-fiber twin of the default
/// build.
///
/// To add a case: a function `int(const Options&)` in a file of its own, and a line in cases.cpp.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "host/pool.h"
#include "host/tsan.h"

namespace ibex::rig {

struct Options {
  uint32_t blocks = 2;
  uint32_t warps = 3;
  uint32_t n16 = 33;
  uint32_t rounds = 4;
  uint32_t workers = 2;
  uint32_t guards_off = 0;  ///< ibex/guards.h
  uint64_t seed = 0;  ///< 0: real time on `workers` threads; otherwise one simulated schedule
  host::Plant plant = host::Plant::none;
  const char* at = "";    ///< where the plant aims: a function for skip-warp-sync, else a name of the case's
  const char* file = "";  ///< what the case reads
  bool print = false;
};

/// Plants the options' bug into the accesses to one object or array; stores that are held back wait for a release in
/// `until`.
void plant(const Options& options, const void* begin, size_t len, const void* until = nullptr, size_t until_len = 0);

/// A pool with its threads. Memory named by arguments outlives `wait`.
class Rig {
 public:
  explicit Rig(const Options& options, ibex_progress_fn progress = nullptr, void* progress_ctx = nullptr);
  ~Rig();
  Rig(const Rig&) = delete;
  Rig& operator=(const Rig&) = delete;

  /// Called on the worker's thread when a launch has finished; may launch.
  using Completed = void (*)(void* ctx);

  /// Exits the process with a message if the pool refuses: a case that cannot run has not passed.
  template <class Args>
  void launch(const char* kernel, uint32_t device, uint32_t blocks, uint32_t warps, const Args& args,
              Completed completed = nullptr, void* ctx = nullptr) {
    launch_bytes(kernel, device, blocks, warps, &args, sizeof(Args), completed, ctx);
  }
  /// Returns when every launch has finished; exits the process if a simulation gets stuck.
  void wait();
  /// Ends the workers. After it nothing that this process reads is written by anybody.
  void stop();

 private:
  struct Outstanding;
  void launch_bytes(const char* kernel, uint32_t device, uint32_t blocks, uint32_t warps,
                    const void* args, size_t len, Completed completed, void* ctx);
  static void on_done(void* outstanding, bool finished);
  bool all_done() const;

  ibex_pool* pool_;
  bool simulation_;
  std::vector<std::thread> threads_;
  /// Counted without order: a lock would tell ThreadSanitizer that what one device's worker has seen happens before
  /// the next launch on another device.
  std::atomic<uint32_t> outstanding_{0};
};

/// A case returns 0 if what it checks holds. Races are the sanitizer's to report.
using Case = int (*)(const Options&);

struct NamedCase {
  const char* name;
  Case run;
};

/// All cases, ended by a null name.
extern const NamedCase kCases[];

}  // namespace ibex::rig
