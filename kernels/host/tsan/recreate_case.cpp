/// A rank dies in the middle of its steps; the others go on without it, while their hosts take its queues out of use
/// and recreate them in place; then it comes back.
///
/// In simulation only: hosts, device and kernels are stepped by one seeded schedule, so that every moment of a
/// recreation meets every moment of a half.
#include <cstdio>

#include "host/tsan/program.h"
#include "host/tsan/world.h"
#include "ibex/half.h"

namespace ibex::rig {

int run_recreate(const Options& options);

namespace {

constexpr uint32_t kSurvivors = 2;
constexpr uint32_t kDead = 2;
constexpr uint32_t kStepsBefore = 2, kStepsWithout = 4, kStepsAfter = 2;

/// One survivor's host while it recreates its queues to the dead rank; see `Session::fence` and `connect`.
class Recovery {
 public:
  Recovery(World& world, uint32_t rank)
      : world_(world), rank_(rank) {
    agent_ = host::tsan_create_agent([](void* self) { return static_cast<Recovery*>(self)->step(); }, this);
    world.rank(rank).host = agent_;
  }
  ~Recovery() {
    world_.rank(rank_).host = nullptr;
    host::tsan_join_agent(agent_);
    host::tsan_destroy_agent(agent_);
  }
  Recovery(const Recovery&) = delete;
  Recovery& operator=(const Recovery&) = delete;

  bool is_done() const {
    host::tsan_join_agent(agent_);
    return stage_ == Stage::done;
  }

 private:
  enum class Stage : uint8_t { watch, remove, mark, fail, grace, reset, connect, done };

  template <class F>
  void each_queue(F f) {
    for (uint32_t c = 0; c < world_.config().num_channels; ++c) {
      const uint32_t q = kDead * world_.config().num_channels + c;
      f(world_.rank(rank_).lane.qps[q], world_.slot(rank_, kDead, c).current());
    }
  }

  bool step() {
    const Stage before = stage_;
    stage_ = next();
    return stage_ != before;
  }

  Stage next() {
    const LaneArgs& a = world_.rank(rank_).lane;
    switch (stage_) {
      case Stage::watch:
        return ld_relaxed_gpu(&a.suspects[kDead]) != 0 ? Stage::remove : Stage::watch;
      case Stage::remove:
        // A pure removal takes effect at once, in both tables: it can only lose data.
        for (uint32_t t = 0; t < 2; ++t) {
          uint64_t* alive = &a.tables[t].alive[kDead / 64];
          st_relaxed_sys(alive, ld_relaxed_sys(alive) & ~(uint64_t{1} << kDead % 64));
        }
        return Stage::mark;
      case Stage::mark:
        each_queue([](QpDeviceCtx& qp, Queue*) { st_release_sys(&qp.state, static_cast<uint32_t>(kQpFenced)); });
        // ORDER(9): mark -> read entered, the host's side of the Dekker pair.
        fence_seq_cst_sys();
        entered_ = ld_relaxed_sys(&a.host_words->entered);
        return Stage::fail;
      case Stage::fail:
        each_queue([](QpDeviceCtx&, Queue* queue) { queue->fail(); });
        return Stage::grace;
      case Stage::grace:
        // ORDER(10): everything a half did -> left. Acquire.
        return ld_acquire_sys(&a.host_words->left) >= entered_ ? Stage::reset : Stage::grace;
      case Stage::reset:
        reset_pair();
        return Stage::connect;
      case Stage::connect:
        // ORDER(19): 2RST on both ends -> fenced_below. Release at sys.
        st_release_sys(&world_.rank(rank_).fenced_below[kDead], ~uint64_t{0});
        // Nothing is sent before the rank is a member again, at the next common step.
        world_.connect(rank_, kDead, {1, 1});
        return Stage::done;
      case Stage::done:
        break;
    }
    return Stage::done;
  }

  /// 2RST on both ends of every queue of the pair: what either has in flight is over.
  void reset_pair() {
    each_queue([](QpDeviceCtx&, Queue* queue) { queue->reset(); });
    for (uint32_t c = 0; c < world_.config().num_channels; ++c) {
      world_.slot(kDead, rank_, c).current()->reset();
    }
    world_.forget(rank_, kDead);
  }

  World& world_;
  const uint32_t rank_;
  Stage stage_ = Stage::watch;
  uint64_t entered_ = 0;
  host::Agent* agent_;
};

uint32_t run_steps(World& world, Rig& rig, uint32_t num_ranks, uint32_t first, uint32_t num) {
  std::vector<std::unique_ptr<Program>> programs;
  for (uint32_t r = 0; r < num_ranks; ++r) {
    programs.push_back(std::make_unique<Program>(world, rig, r, first, num));
    if (num_ranks == kSurvivors) programs[r]->expect_lost(kDead);
  }
  for (auto& program : programs) program->start();
  rig.wait();
  uint32_t num_wrong = 0;
  for (auto& program : programs) num_wrong += program->num_wrong();
  return num_wrong;
}

/// Between two steps: the new incarnation starts where the others stand, and all are members again.
void rejoin(World& world) {
  const LaneState& now = *world.rank(0).lane.state;
  const uint64_t base[kNumOps] = {now.next[kDispatch], now.next[kCombine]};
  Rank& back = world.rank(kDead);
  *back.lane.state = LaneState{};
  for (uint32_t op = 0; op < kNumOps; ++op) {
    back.lane.state->next[op] = base[op];
    back.lane.state->credited[op] = base[op] - 1;
    // It is done with every step before its own, and says so.
    for (uint32_t back_by = 1; back_by <= world.config().ring && back_by < base[op]; ++back_by) {
      const uint64_t seq = base[op] - back_by;
      back.lane.state->pending[op][ring_slot(back.lane.shape, seq)] = seq;
    }
  }
  for (uint32_t r = 0; r < world.config().num_ranks; ++r) {
    if (r != kDead) world.forget(kDead, r);
    world.connect(kDead, r, base);
    if (r == kDead) continue;
    for (uint32_t op = 0; op < kNumOps; ++op) world.rank(r).lane.peers[kDead].base_seq[op] = base[op];
    st_release_sys(&world.rank(r).fenced_below[kDead], base[kCombine]);
    for (uint32_t t = 0; t < 2; ++t) world.rank(r).lane.tables[t].alive[0] |= uint64_t{1} << kDead;
  }
  back.alive = true;
}

}  // namespace

int run_recreate(const Options& options) {
  EpConfig c{"recreate"};
  c.num_ranks = kSurvivors + 1;
  c.detect_ms = 4;
  c.max_tokens = 4;
  c.warps = 2;
  c.num_owner_warps = 1;
  if (options.seed == 0) {
    std::fprintf(stderr, "recreate needs a seed: it is a simulation\n");
    return 2;
  }
  World world(c, options);
  world.plant();
  Rig rig(options, World::progress, &world);
  uint32_t num_wrong = run_steps(world, rig, c.num_ranks, 0, kStepsBefore);
  world.kill(kDead);
  bool done = true;
  {
    Recovery first(world, 0), second(world, 1);
    num_wrong += run_steps(world, rig, kSurvivors, kStepsBefore, kStepsWithout);
    done = first.is_done() && second.is_done();
  }
  if (!done) {
    std::fprintf(stderr, "recreate: the steps were over before the recreation\n");
    return 1;
  }
  rejoin(world);
  num_wrong += run_steps(world, rig, c.num_ranks, kStepsBefore + kStepsWithout, kStepsAfter);
  rig.stop();
  return num_wrong == 0 && world.queues_are_clean() ? 0 : 1;
}

}  // namespace ibex::rig
