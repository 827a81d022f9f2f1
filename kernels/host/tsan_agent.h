/// Agents outside kernels as ThreadSanitizer sees them: strangers to whoever steps them.
///
/// An agent has a stack and a ThreadSanitizer fiber of its own, so that it is ordered with kernels only by the
/// accesses that it makes. Elsewhere stepping it is a plain call. Only the rig of host/tsan uses agents.
#pragma once

namespace ibex::host {

#if defined(IBEX_TSAN)

struct Agent;
/// `step(ctx)` happens after this call; its first time also after `tsan_start_agent`. One thread steps an agent.
Agent* tsan_create_agent(bool (*step)(void* ctx), void* ctx);
void tsan_start_agent(Agent* agent);
/// Returns what the agent's step returns.
bool tsan_step_agent(Agent* agent);
/// Everything the agent has done happens before what the caller does next.
void tsan_join_agent(Agent* agent);
void tsan_destroy_agent(Agent* agent);

#else

struct Agent {
  bool (*step)(void* ctx);
  void* ctx;
};
inline Agent* tsan_create_agent(bool (*step)(void* ctx), void* ctx) { return new Agent{step, ctx}; }
inline bool tsan_step_agent(Agent* agent) { return agent->step(agent->ctx); }
inline void tsan_start_agent(Agent*) {}
inline void tsan_join_agent(Agent*) {}
inline void tsan_destroy_agent(Agent* agent) { delete agent; }

#endif

}  // namespace ibex::host
