/// The report of a stuck worker: every fiber that has not left, and what it waits for.
#include <dlfcn.h>

#include <cinttypes>
#include <cstdio>

#include "host/sched.h"

namespace ibex::host {

namespace {
/// Lines of fibers in one report; the first few say what all the others wait for.
constexpr uint32_t kDumpLinesMax = 64;

/// The code address relative to its object, as addr2line wants it.
uintptr_t relative_pc(const void* pc) {
  Dl_info info;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pc);
  if (pc == nullptr || dladdr(pc, &info) == 0) return address;
  return address - reinterpret_cast<uintptr_t>(info.dli_fbase);
}

void print_fiber(const Fiber& f) {
  std::fprintf(stderr, "  block %u warp %u", f.block->idx, f.warp);
  if (kFibersPerWarp > 1) std::fprintf(stderr, " lane %u", f.lane);
  switch (f.state) {
    case FiberState::polling:
      if (f.last == nullptr) {
        std::fprintf(stderr, ": backs off (pc +%#" PRIxPTR ")\n", relative_pc(f.pc));
        return;
      }
      std::fprintf(stderr, ": polls %p, sees %#" PRIx64 " (pc +%#" PRIxPTR ")\n", f.last, f.last_value,
                   relative_pc(f.pc));
      return;
    case FiberState::barrier: {
      const Meeting& m = f.block->barriers[f.wait_id];
      std::fprintf(stderr, ": at barrier %u, %u arrived\n", f.wait_id, m.arrived / kFibersPerWarp);
      return;
    }
    case FiberState::collective:
      std::fprintf(stderr, ": at warp collective %u, %u lanes arrived\n", f.collective,
                   f.block->warps[f.warp].meeting.arrived);
      return;
    case FiberState::ready:
    case FiberState::exited: std::fprintf(stderr, ": ready to run\n"); return;
  }
}
}  // namespace

void Worker::dump(const char* why) const {
  std::fprintf(stderr, "ibex: worker %u: %s\n", index, why);
  if (sim) {
    std::fprintf(stderr, "ibex: seed %" PRIu64 ", virtual time %" PRIu64 " ns\n", config.seed, sim->now_ns());
  }
  uint32_t lines = 0;
  for (const Grid* g : grids_) {
    std::fprintf(stderr, " kernel %s on device %u: %u of %u fibers\n", g->kernel->name, g->device, g->live,
                 g->num_fibers());
    for (uint32_t i = 0; i < g->num_fibers(); ++i) {
      if (g->fibers[i].state == FiberState::exited) continue;
      if (++lines > kDumpLinesMax) {
        std::fprintf(stderr, "  ... and more\n");
        std::fflush(stderr);
        return;
      }
      print_fiber(g->fibers[i]);
    }
  }
  std::fflush(stderr);
}

}  // namespace ibex::host
