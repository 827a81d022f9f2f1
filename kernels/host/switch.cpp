/// The switch itself, in assembly: a function call as far as the compiler is concerned.
#include "host/switch.h"

#include <cstdint>

asm(R"(
.text
.globl ibex_host_switch_context
.hidden ibex_host_switch_context
.type ibex_host_switch_context, @function
.p2align 4
ibex_host_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ibex_host_switch_context, .-ibex_host_switch_context
)");

namespace ibex::host {

void* prepare_stack(char* top, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  void** sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--sp = nullptr;  // The return address of `entry`: backtraces end here.
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--sp = nullptr;
  return sp;
}

}  // namespace ibex::host
