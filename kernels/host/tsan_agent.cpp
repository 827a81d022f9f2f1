/// Switching to an agent and back. Without instrumentation: what is handed over here is nobody's race.
#include "host/tsan_agent.h"

#if defined(IBEX_TSAN)

#include <memory>

#include "host/switch.h"
#include "host/tsan_sched.h"

namespace ibex::host {

struct Agent {
  bool (*step)(void* ctx) = nullptr;
  void* ctx = nullptr;
  bool worked = false, started = false;
  void *sp = nullptr, *caller_sp = nullptr;
  void *fiber = nullptr, *caller = nullptr;
  std::unique_ptr<char[]> stack;
};

namespace {
constexpr size_t kStackLen = 64 << 10;
thread_local Agent* tl_agent;

[[noreturn]] void run() {
  Agent* a = tl_agent;
  tsan_edge_acquire(&a->started);
  for (;;) {
    a->worked = a->step(a->ctx);
    tsan_edge_release(a);
    tsan_switch(a->caller);
    switch_context(&a->sp, a->caller_sp);
  }
}
}  // namespace

Agent* tsan_create_agent(bool (*step)(void* ctx), void* ctx) {
  auto agent = std::make_unique<Agent>();
  agent->step = step;
  agent->ctx = ctx;
  agent->stack = std::make_unique<char[]>(kStackLen);
  agent->sp = prepare_stack(agent->stack.get() + kStackLen, run);
  agent->fiber = tsan_create_fiber();
  return agent.release();
}

void tsan_start_agent(Agent* agent) { tsan_edge_release(&agent->started); }

bool tsan_step_agent(Agent* agent) {
  // Once: the thread's own beginnings, which have set up its thread-local memory.
  if (!agent->started) tsan_edge_release(&agent->started);
  agent->started = true;
  tl_agent = agent;
  agent->caller = tsan_this_fiber();
  tsan_switch(agent->fiber);
  switch_context(&agent->caller_sp, agent->sp);
  return agent->worked;
}

void tsan_join_agent(Agent* agent) { tsan_edge_acquire(agent); }

void tsan_destroy_agent(Agent* agent) {
  tsan_free_fiber(agent->fiber);
  delete agent;
}

}  // namespace ibex::host

#endif
