/// The seeded schedule: who runs next, and how virtual time passes.
///
/// Every decision comes from one generator, so a seed replays exactly; a hash over the decisions proves it.
/// The schedule has *phases*: for a while switches are frequent or rare, the device is eager or starved,
/// one rank is slow. Uniform choices would almost never let one agent run far ahead of another.
///
/// A fiber that has come round twice without news since the last event is *parked*: it would find the same
/// again, so it is not asked before the next event. Virtual time moves only when nothing else can: every fiber
/// is parked, and `progress` has nothing to do. Then it goes on by quanta that grow while the silence lasts, or
/// to the deadline that `progress` reported. An event is a named access that changed memory, a fiber that left
/// or was released, a launch, progress that worked, or time that moved.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ibex::host {

struct Fiber;

class Sim {
 public:
  explicit Sim(uint64_t seed);

  /// Is this named access a switch? Decides also whether the phase ends.
  bool switches_here();
  /// Is it the main context's (the device's) turn?
  bool progress_turn();
  /// Picks one of the ready fibers; `ready` is not empty.
  uint32_t pick(const std::vector<Fiber*>& ready);
  /// A value for `progress` to make its own choices with.
  uint64_t random() { return next(); }
  /// Folds who runs next into the schedule's hash.
  void note(uint64_t agent) { hash_ = (hash_ ^ agent) * 0x100000001b3u; }
  uint64_t hash() const { return hash_; }

  void event();
  uint64_t events() const { return events_; }
  /// Lets time pass in silence, at most to `deadline`.
  void advance(uint64_t deadline);
  uint64_t now_ns() const { return now_ns_; }
  uint64_t quiet_ns() const { return quiet_ns_; }
  /// Counts a turn of the main context; returns the decisions since time last moved.
  uint64_t count_step() { return ++steps_; }

  /// Makes room, so that no fiber has to: ThreadSanitizer would see it move what others wrote.
  void reserve(size_t fibers);

  /// Fibers that may run, in no particular order.
  std::vector<Fiber*> ready;
  /// Fibers that wait for an event.
  std::vector<Fiber*> parked;
  /// Fibers of frozen devices that would otherwise be ready.
  std::vector<Fiber*> frozen;
  bool is_frozen(uint32_t device) const;
  void set_frozen(uint32_t device, bool frozen);

 private:
  uint64_t next();
  bool chance(uint32_t log2) { return (next() >> 32 & ((uint64_t{1} << log2) - 1)) == 0; }
  void begin_phase();
  void news();

  uint64_t state_;
  uint64_t hash_ = 0xcbf29ce484222325u;
  uint64_t events_ = 1;
  uint64_t now_ns_ = 1'000'000;
  uint64_t quiet_ns_ = 0;
  uint64_t steps_ = 0;
  uint32_t phase_left_ = 0;
  uint32_t switch_log2_ = 0;
  uint32_t progress_log2_ = 0;
  uint32_t slow_device_ = 0;
  std::vector<uint32_t> frozen_devices_;
};

}  // namespace ibex::host
