#include "host/sim.h"

#include <algorithm>

#include "host/sched.h"

namespace ibex::host {

namespace {
/// Phases last so many named accesses, drawn anew each time.
constexpr uint32_t kPhaseMin = 256;
constexpr uint32_t kPhaseSpan = 8192;
/// A slow device's fibers run only once in so many picks that fall on them.
constexpr uint32_t kSlowLog2 = 6;
constexpr uint32_t kNoDevice = ~0u;
/// Devices a phase may slow down; beyond the device numbers in use it means nobody.
constexpr uint32_t kSlowCandidates = 16;
/// First step of time in a silence, and by which fraction of the silence it grows.
constexpr uint64_t kQuantumNs = 1000;
constexpr uint64_t kQuantumFraction = 2;
}  // namespace

Sim::Sim(uint64_t seed) : state_(seed) { begin_phase(); }

/// splitmix64: every seed is a good seed.
uint64_t Sim::next() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

void Sim::begin_phase() {
  phase_left_ = kPhaseMin + static_cast<uint32_t>(next() % kPhaseSpan);
  switch_log2_ = static_cast<uint32_t>(next() % 8);
  progress_log2_ = static_cast<uint32_t>(next() % 7);
  slow_device_ = chance(1) ? static_cast<uint32_t>(next() % kSlowCandidates) : kNoDevice;
}

bool Sim::switches_here() {
  ++steps_;
  if (--phase_left_ == 0) begin_phase();
  return chance(switch_log2_);
}

bool Sim::progress_turn() {
  ++steps_;
  if (--phase_left_ == 0) begin_phase();
  return chance(progress_log2_);
}

uint32_t Sim::pick(const std::vector<Fiber*>& ready) {
  uint32_t i = static_cast<uint32_t>(next() % ready.size());
  if (ready[i]->block->grid->device == slow_device_ && !chance(kSlowLog2)) {
    i = static_cast<uint32_t>(next() % ready.size());
  }
  return i;
}

bool Sim::is_frozen(uint32_t device) const {
  return std::find(frozen_devices_.begin(), frozen_devices_.end(), device) != frozen_devices_.end();
}

void Sim::set_frozen(uint32_t device, bool frozen) {
  std::erase(frozen_devices_, device);
  if (frozen) frozen_devices_.push_back(device);
}

void Sim::reserve(size_t fibers) {
  ready.reserve(fibers);
  parked.reserve(fibers);
  frozen.reserve(fibers);
}

void Sim::news() {
  ++events_;
  // One by one: a range is moved by memmove, which ThreadSanitizer intercepts and takes for an access of the kernel.
  for (Fiber* f : parked) ready.push_back(f);
  parked.clear();
}

void Sim::event() {
  news();
  quiet_ns_ = 0;
}

void Sim::advance(uint64_t deadline) {
  const uint64_t grown = quiet_ns_ / kQuantumFraction;
  uint64_t quantum = grown > kQuantumNs ? grown : kQuantumNs;
  if (deadline > now_ns_ && deadline - now_ns_ < quantum) quantum = deadline - now_ns_;
  now_ns_ += quantum;
  quiet_ns_ += quantum;
  steps_ = 0;
  news();  // Time is news as well: whoever waits for a deadline must come round again.
}

}  // namespace ibex::host
