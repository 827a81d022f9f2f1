/// ptx.h on nvcc: one PTX instruction per function.
#pragma once
#include "ibex/defs.h"

namespace ibex {

#define IBEX_PTX_LD(order, scope, type, bits, reg)                                                     \
  IBEX_DEV type ld_##order##_##scope(const type* p) {                                                  \
    type v;                                                                                            \
    asm volatile("ld." #order "." #scope ".global.u" #bits " %0, [%1];" : "=" reg(v) : "l"(p) : "memory"); \
    return v;                                                                                          \
  }

#define IBEX_PTX_ST(order, scope, type, bits, reg)                                                       \
  IBEX_DEV void st_##order##_##scope(type* p, type v) {                                                  \
    asm volatile("st." #order "." #scope ".global.u" #bits " [%0], %1;" ::"l"(p), reg(v) : "memory");    \
  }

#define IBEX_PTX_RMW(name, op, order, scope, type, reg)                                       \
  IBEX_DEV type name##_##order##_##scope(type* p, type v) {                                   \
    type old;                                                                                 \
    asm volatile("atom." #order "." #scope ".global." op " %0, [%1], %2;"                     \
                 : "=" reg(old)                                                               \
                 : "l"(p), reg(v)                                                             \
                 : "memory");                                                                 \
    return old;                                                                               \
  }

#define IBEX_PTX_CAS(order, scope, type, bits, reg)                                           \
  IBEX_DEV type cas_##order##_##scope(type* p, type expected, type wanted) {                  \
    type old;                                                                                 \
    asm volatile("atom." #order "." #scope ".global.cas.b" #bits " %0, [%1], %2, %3;"         \
                 : "=" reg(old)                                                               \
                 : "l"(p), reg(expected), reg(wanted)                                         \
                 : "memory");                                                                 \
    return old;                                                                               \
  }

#define IBEX_PTX_RMW_ORDERS(name, op, scope, type, reg) \
  IBEX_PTX_RMW(name, op, relaxed, scope, type, reg)     \
  IBEX_PTX_RMW(name, op, acquire, scope, type, reg)     \
  IBEX_PTX_RMW(name, op, release, scope, type, reg)     \
  IBEX_PTX_RMW(name, op, acq_rel, scope, type, reg)

#define IBEX_PTX_TYPE(scope, type, bits, reg)                    \
  IBEX_PTX_LD(relaxed, scope, type, bits, reg)                   \
  IBEX_PTX_LD(acquire, scope, type, bits, reg)                   \
  IBEX_PTX_ST(relaxed, scope, type, bits, reg)                   \
  IBEX_PTX_ST(release, scope, type, bits, reg)                   \
  IBEX_PTX_RMW_ORDERS(add, "add.u" #bits, scope, type, reg)      \
  IBEX_PTX_RMW_ORDERS(exch, "exch.b" #bits, scope, type, reg)    \
  IBEX_PTX_RMW_ORDERS(or, "or.b" #bits, scope, type, reg)        \
  IBEX_PTX_RMW_ORDERS(max, "max.u" #bits, scope, type, reg)      \
  IBEX_PTX_CAS(relaxed, scope, type, bits, reg)                  \
  IBEX_PTX_CAS(acq_rel, scope, type, bits, reg)

#define IBEX_PTX_PEEK(scope, type) \
  IBEX_DEV type peek_relaxed_##scope(const type* p) { return ld_relaxed_##scope(p); }

#define IBEX_PTX_SCOPE(scope)               \
  IBEX_PTX_TYPE(scope, uint32_t, 32, "r")   \
  IBEX_PTX_TYPE(scope, uint64_t, 64, "l")   \
  IBEX_PTX_PEEK(scope, uint32_t)            \
  IBEX_PTX_PEEK(scope, uint64_t)

IBEX_PTX_SCOPE(gpu)
IBEX_PTX_SCOPE(sys)

#undef IBEX_PTX_SCOPE
#undef IBEX_PTX_PEEK
#undef IBEX_PTX_TYPE
#undef IBEX_PTX_RMW_ORDERS
#undef IBEX_PTX_CAS
#undef IBEX_PTX_RMW
#undef IBEX_PTX_ST
#undef IBEX_PTX_LD

IBEX_DEV void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
IBEX_DEV void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
IBEX_DEV void fence_seq_cst_gpu() { asm volatile("fence.sc.gpu;" ::: "memory"); }
IBEX_DEV void fence_seq_cst_sys() { asm volatile("fence.sc.sys;" ::: "memory"); }

IBEX_DEV void st_relaxed_mmio_sys(uint64_t* p, uint64_t v) {
  asm volatile("st.mmio.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

IBEX_DEV void st_wqe(uint4* p, uint4 v) {
  asm volatile("st.relaxed.sys.global.L1::no_allocate.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

IBEX_DEV uint4 ld_stream16(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

IBEX_DEV void st_stream16(uint4* p, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

IBEX_DEV uint64_t clock_ns() {
  uint64_t v;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v));
  return v;
}

IBEX_DEV void backoff() { asm volatile("nanosleep.u32 20;" ::: "memory"); }

}  // namespace ibex
