/// Stacks for fibers: mapped in slabs, each stack with a guard page below it, reused until the pool goes.
///
/// Launch overhead is the reason: a replayed graph starts tens of fibers ten thousand times. The free list is
/// last-in first-out, so a replay finds its stacks in the cache.
#pragma once
#include <cstddef>
#include <vector>

namespace ibex::host {

class Stacks {
 public:
  explicit Stacks(size_t stack_len);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  /// Makes sure that at least `num` stacks are mapped. False if the system refuses.
  bool map(size_t num);
  /// Lowest address of a free stack. The caller has mapped as many as it takes.
  char* take();
  void give(char* stack) { free_.push_back(stack); }
  /// One past the highest usable address; stacks start at staggered offsets so that hot frames of different
  /// fibers do not share cache sets.
  char* top(char* stack) const;
  size_t num_mapped() const { return num_mapped_; }

 private:
  bool map_slab();

  size_t stack_len_;
  size_t stride_;
  size_t num_mapped_ = 0;
  std::vector<char*> free_;
  std::vector<char*> slabs_;
};

}  // namespace ibex::host
