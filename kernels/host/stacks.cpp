#include "host/stacks.h"

#include <sys/mman.h>

#include <cstdint>

namespace ibex::host {

namespace {
constexpr size_t kPage = 4096;
constexpr size_t kStacksPerSlab = 32;
/// Stagger of stack tops: distinct cache lines, well within one page. Chosen; see tests/simt.rs launch
/// figures.
constexpr size_t kColours = 16;
constexpr size_t kColourStep = 192;

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
}  // namespace

Stacks::Stacks(size_t stack_len) : stack_len_(round_up(stack_len, kPage)), stride_(stack_len_ + kPage) {}

Stacks::~Stacks() {
  for (char* slab : slabs_) munmap(slab, stride_ * kStacksPerSlab);
}

bool Stacks::map_slab() {
  void* mem = mmap(nullptr, stride_ * kStacksPerSlab, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (mem == MAP_FAILED) return false;
  char* slab = static_cast<char*>(mem);
  for (size_t i = 0; i < kStacksPerSlab; ++i) {
    if (mprotect(slab + i * stride_, kPage, PROT_NONE) != 0) {
      munmap(slab, stride_ * kStacksPerSlab);
      return false;
    }
  }
  slabs_.push_back(slab);
  for (size_t i = kStacksPerSlab; i-- > 0;) free_.push_back(slab + i * stride_ + kPage);
  num_mapped_ += kStacksPerSlab;
  return true;
}

bool Stacks::map(size_t num) {
  while (num_mapped_ < num) {
    if (!map_slab()) return false;
  }
  return true;
}

char* Stacks::take() {
  char* stack = free_.back();
  free_.pop_back();
  return stack;
}

char* Stacks::top(char* stack) const {
  const size_t colour = reinterpret_cast<uintptr_t>(stack) / stride_ % kColours;
  return stack + stack_len_ - colour * kColourStep;
}

}  // namespace ibex::host
