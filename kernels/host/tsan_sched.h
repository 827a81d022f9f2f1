/// What the scheduler tells ThreadSanitizer: which fiber runs, and the edges that barriers and launches draw.
///
/// The runtime itself is compiled without instrumentation, so only kernels' accesses are judged.
#pragma once

#if defined(IBEX_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace ibex::host {

struct Fiber;

#if defined(IBEX_TSAN)
inline void* tsan_this_fiber() { return __tsan_get_current_fiber(); }
inline void* tsan_create_fiber() { return __tsan_create_fiber(0); }
/// Switching draws no edge: two fibers of one OS thread race like two CUDA threads.
inline void tsan_switch(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
inline void tsan_edge_release(void* key) { __tsan_release(key); }
inline void tsan_edge_acquire(void* key) { __tsan_acquire(key); }
inline void tsan_free_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
/// Frees the fiber and its fence helpers. The fiber is not the current one.
void tsan_destroy_fiber(Fiber* f);
#else
inline void* tsan_this_fiber() { return nullptr; }
inline void* tsan_create_fiber() { return nullptr; }
inline void tsan_switch(void*) {}
inline void tsan_edge_release(void*) {}
inline void tsan_edge_acquire(void*) {}
inline void tsan_free_fiber(void*) {}
inline void tsan_destroy_fiber(Fiber*) {}
#endif

}  // namespace ibex::host
