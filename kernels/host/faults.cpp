/// Simulation: devices that die, or stop for a while, between any two named accesses.
///
/// Both happen in the main context, where no fiber runs: so every fiber stands at a point where the schedule could
/// have switched, and a death is a device that never gets another turn. What it has stored stays stored.
#include <algorithm>

#include "host/sched.h"

namespace ibex::host {

namespace {
bool runs_on(const Fiber* f, uint32_t device) { return f->block->grid->device == device; }
}  // namespace

void Worker::unlink_inbox(uint32_t device, std::vector<Grid*>& killed) {
  std::lock_guard lock(mutex_);
  Grid* kept = inbox_head_;
  inbox_head_ = inbox_tail_ = nullptr;
  while (kept != nullptr) {
    Grid* grid = kept;
    kept = grid->next;
    grid->next = nullptr;
    if (grid->device == device) {
      killed.push_back(grid);
      continue;
    }
    if (inbox_tail_ != nullptr) inbox_tail_->next = grid;
    else inbox_head_ = grid;
    inbox_tail_ = grid;
  }
}

/// A grid without live fibers has ended already: `finish_grids` says so soon.
void Worker::unlink_running(uint32_t device, std::vector<Grid*>& killed) {
  std::erase_if(grids_, [&](Grid* grid) {
    if (grid->device != device || grid->live == 0) return false;
    live_ -= grid->live;
    killed.push_back(grid);
    return true;
  });
}

void Worker::kill(uint32_t device) {
  const auto dies = [&](const Fiber* f) { return runs_on(f, device); };
  sim->event();
  std::erase_if(sim->ready, dies);
  std::erase_if(sim->frozen, dies);
  std::vector<Grid*> killed;
  unlink_inbox(device, killed);
  unlink_running(device, killed);
  for (Grid* grid : killed) {
    release_grid(grid);
    free_grid(grid, false);
  }
  sim->set_frozen(device, false);
}

void Worker::freeze(uint32_t device, bool frozen) {
  // News for all: whoever is parked is ready from here on.
  sim->event();
  sim->set_frozen(device, frozen);
  std::vector<Fiber*>& from = frozen ? sim->ready : sim->frozen;
  std::vector<Fiber*>& to = frozen ? sim->frozen : sim->ready;
  const auto moves = std::stable_partition(from.begin(), from.end(), [&](Fiber* f) { return !runs_on(f, device); });
  to.insert(to.end(), moves, from.end());
  from.erase(moves, from.end());
}

}  // namespace ibex::host
