// Chooses the instruction set, once, by what the processor says; EFFT_CPU_ISA names a lesser one, for tests.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

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
  bool allowed = !named || !*named;
  const Kernels* chosen = nullptr;
  const auto consider = [&](const Kernels& set, bool has) {  // the best first
    allowed = allowed || !std::strcmp(named, set.isa);
    if (!chosen && allowed && has) chosen = &set;
  };
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  consider(avx512bf16::table, has_avx512 && __builtin_cpu_supports("avx512bf16"));
  consider(avx512::table, has_avx512);
  consider(avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#endif
  consider(portable::table, true);
  if (!chosen) throw std::runtime_error(std::string("EFFT_CPU_ISA names no instruction set of this machine: ") + named);
  return *chosen;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = best();
  return chosen;
}

}  // namespace efft
