/// The table of kernels. It names every kernel, so the linker keeps them all.
#include "ibex/kernel.h"
#include "ibex/kernel_list.h"
#include "host/registry.h"
#include "host/pool.h"

#define IBEX_DECLARE(name, id) extern "C" const ibex_kernel ibex_kernel_##name;
IBEX_KERNEL_LIST(IBEX_DECLARE)
#undef IBEX_DECLARE

namespace ibex::host {

const ibex_kernel* find_kernel(uint32_t id) {
  switch (id) {
#define IBEX_ENTRY(name, number) \
  case number: return &ibex_kernel_##name;
    IBEX_KERNEL_LIST(IBEX_ENTRY)
#undef IBEX_ENTRY
    default: return nullptr;
  }
}

}  // namespace ibex::host

const char* ibex_kernel_name(uint32_t kernel_id) {
  const ibex_kernel* k = ibex::host::find_kernel(kernel_id);
  return k != nullptr ? k->name : nullptr;
}

uint32_t ibex_kernel_args_len(uint32_t kernel_id) {
  const ibex_kernel* k = ibex::host::find_kernel(kernel_id);
  return k != nullptr ? k->args_len : 0;
}

uint32_t ibex_kernel_threads_max(uint32_t kernel_id) {
  const ibex_kernel* k = ibex::host::find_kernel(kernel_id);
  return k != nullptr ? k->threads_max : 0;
}
