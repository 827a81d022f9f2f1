/// Dispatch, expert and combine between the ranks of this process, on every route and in every mode.
#include <cstdio>

#include "host/tsan/program.h"
#include "host/tsan/world.h"

namespace ibex::rig {

int run_ep(const Options& options, const EpConfig& config);

/// Runs all ranks through the configuration's steps and checks what came out.
int run_ep(const Options& options, const EpConfig& config) {
  World world(config, options);
  world.plant();
  Rig rig(options, World::progress, &world);
  std::vector<std::unique_ptr<Program>> programs;
  for (uint32_t r = 0; r < config.num_ranks; ++r) {
    programs.push_back(std::make_unique<Program>(world, rig, r, 0, config.num_steps));
  }
  for (auto& program : programs) program->start();
  rig.wait();
  uint32_t num_wrong = 0;
  for (auto& program : programs) num_wrong += program->num_wrong();
  rig.stop();
  const bool clean = world.queues_are_clean();
  return num_wrong == 0 && clean ? 0 : 1;
}

int run_ep_ibgda(const Options& options) {
  EpConfig c{"ep-ibgda"};
  c.blocks = 2;
  c.warps = 1;
  c.num_owner_warps = 1;
  return run_ep(options, c);
}

int run_ep_mapped(const Options& options) {
  EpConfig c{"ep-mapped"};
  c.routes = Routes::mapped;
  c.wire_dtype = kWireBf16;
  return run_ep(options, c);
}

/// A queue smaller than a step, and rows through a ring of two: owners wait for completions in the middle of a step.
int run_ep_staged(const Options& options) {
  EpConfig c{"ep-staged"};
  c.num_channels = 1;
  c.max_tokens = 20;
  c.sq_wqebbs = 16;
  c.zero_copy = false;
  c.staging_rows = 2;
  c.scale_kind = kScaleUe8m0;
  c.signal_mode = kSignalFetchAdd;
  c.num_steps = 4;
  return run_ep(options, c);
}

/// Three ranks, each of which reaches one peer by RDMA and one by stores.
int run_ep_reduced(const Options& options) {
  EpConfig c{"ep-reduced"};
  c.num_ranks = 3;
  c.routes = Routes::mixed;
  c.combine_mode = kReduced;
  c.scale_kind = kScalePow2;
  c.num_owner_warps = 1;
  c.num_steps = 4;
  c.warps = 2;
  return run_ep(options, c);
}

/// Halves apart, so that steps overlap, credits are waited for, and two halves of a rank run at a time.
int run_ep_split(const Options& options) {
  EpConfig c{"ep-split"};
  c.warps = 2;
  c.num_owner_warps = 1;
  c.split = true;
  c.num_steps = 6;
  return run_ep(options, c);
}

/// A ring of one: the credit of a step is all that lets the next one write where it was read. It is posted by an owner
/// that is not the leader, whose fence on entry would publish it as well.
int run_ep_split_mapped(const Options& options) {
  EpConfig c{"ep-split-mapped"};
  c.ring = 1;
  c.num_channels = 1;
  c.split = true;
  c.routes = Routes::mapped;
  c.wire_dtype = kWireBf16;
  c.num_steps = 16;
  return run_ep(options, c);
}

}  // namespace ibex::rig
