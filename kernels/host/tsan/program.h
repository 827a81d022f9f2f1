/// What each rank launches, step after step, and whether the numbers that come out are right.
///
/// A program is a list of launches per rank, each after those it names, as streams and events order them. A
/// launch is started from the completion of the last one it waits for, on the thread that completes it.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "host/tsan/rig.h"
#include "host/tsan/world.h"

namespace ibex::rig {

/// Steps of one rank on its streams.
class Program {
 public:
  /// Steps `first`.. of `num` on `rank`. `expected_lost` is the rank whose experts' picks are lost; kNobody: none.
  Program(World& world, Rig& rig, uint32_t rank, uint32_t first, uint32_t num);

  static constexpr uint32_t kNobody = ~0u;
  void expect_lost(uint32_t rank) { expected_lost_ = rank; }
  /// Starts whatever waits for nothing.
  void start();
  /// Outputs that were not what the reference says. Exact once the rig has been waited for.
  uint32_t num_wrong() const { return num_wrong_.load(std::memory_order_relaxed); }

 private:
  enum class Kind : uint8_t {
    dispatch_send,
    dispatch_receive,
    dispatch,
    expert,
    combine_send,
    combine_receive,
    combine,
  };
  struct Launch {
    Program* program;
    Kind kind;
    uint32_t step;
    uint32_t waits_for;               ///< launches that have not completed
    std::vector<uint32_t> followers;
  };

  uint32_t add(Kind kind, uint32_t step, std::initializer_list<uint32_t> after);
  void build_in_turn(uint32_t step);
  void build_split(uint32_t first, uint32_t num);
  void run(Launch& launch);
  static void completed(void* launch);

  World& world_;
  Rig& rig_;
  const uint32_t rank_;
  uint32_t expected_lost_ = kNobody;
  uint32_t next_nonce_;
  std::vector<std::unique_ptr<Launch>> launches_;
  std::atomic<uint32_t> num_wrong_{0};
};

/// Inputs of one step: every step has other rows, picks and weights, some masked and some doubled.
void fill_inputs(World& world, uint32_t rank, uint32_t step);
/// Holds the combined rows of one step against plain sums. Returns how many tokens are wrong, and prints the first.
uint32_t check_outputs(World& world, uint32_t rank, uint32_t step, uint32_t expected_lost);

}  // namespace ibex::rig
