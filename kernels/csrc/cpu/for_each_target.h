// Includes the file SSM_KERNELS once for every instruction set, each time in a namespace of its own, with SSM_NATIVE floats
// in a register. SSM_BEST(function) is the one for this machine. Standard headers must be included before.
#include "platform.h"

#if SSM_HAS_TARGETS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi2")
#define SSM_NATIVE 16
namespace avx512 {
#include SSM_KERNELS
}
#undef SSM_NATIVE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define SSM_NATIVE 8
namespace avx2 {
#include SSM_KERNELS
}
#undef SSM_NATIVE
#pragma GCC pop_options

#endif

#define SSM_NATIVE 4
namespace baseline {
#include SSM_KERNELS
}
#undef SSM_NATIVE

#if SSM_HAS_TARGETS
SSM_INLINE bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
SSM_INLINE bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
#define SSM_BEST(function) (has_avx512() ? avx512::function : has_avx2() ? avx2::function : baseline::function)
#else
#define SSM_BEST(function) baseline::function
#endif
