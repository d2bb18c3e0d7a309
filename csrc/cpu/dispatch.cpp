// Chooses the instruction set, once, by what the processor says; EFFT_CPU_ISA names a lesser one, for tests.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace efft {

#if defined(__x86_64__)
namespace avx512bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace portable {
extern const Kernels table;
}

namespace {

const Kernels& best() {
  const char* named = std::getenv("EFFT_CPU_ISA");
  const auto allowed = [named](const Kernels& set) { return !named || !*named || !std::strcmp(named, set.isa); };
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16") && allowed(avx512bf16::table)) return avx512bf16::table;
    if (allowed(avx512::table)) return avx512::table;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed(avx2::table)) return avx2::table;
#endif
  return portable::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = best();
  return chosen;
}

}  // namespace efft
