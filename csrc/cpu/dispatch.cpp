// Chooses the best instruction set that the processor supports, once per process. For tests, EFFT_CPU_ISA can name the
// best instruction set to consider.
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace efft {

#if defined(__x86_64__)
namespace amx {
extern const Kernels table;
}
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

#if defined(__x86_64__)
// Returns whether the processor has matrix registers (AMX) and the system allows this process to use them. A process
// must request them from the system once, because the system then reserves memory for their contents in the state of
// every thread.
bool has_matrix_registers() {
  constexpr unsigned bf16 = 1U << 22, tiles = 1U << 24;
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & bf16) != 0 && (d & tiles) != 0;
  return has && syscall(SYS_arch_prctl, request, tile_data) == 0;
}
#endif

// Returns the table of the best instruction set that the processor supports, among the set that EFFT_CPU_ISA names and
// all lesser sets. Throws an exception if the variable names an unknown set.
const Kernels& best() {
  const char* named = std::getenv("EFFT_CPU_ISA");
  bool allowed = !named || !*named;
  const Kernels* chosen = nullptr;
  std::string names;
  const auto consider = [&](const Kernels& set, bool has) {  // called for every set, from the best to the worst
    names += (names.empty() ? "" : ", ") + std::string(set.isa);
    allowed = allowed || !std::strcmp(named, set.isa);
    if (!chosen && allowed && has) chosen = &set;
  };
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_pairs = has_avx512 && __builtin_cpu_supports("avx512bf16");
  consider(amx::table, has_pairs && has_matrix_registers());
  consider(avx512bf16::table, has_pairs);
  consider(avx512::table, has_avx512);
  consider(avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#endif
  consider(portable::table, true);
  if (!chosen) throw std::runtime_error("EFFT_CPU_ISA must be one of " + names + ", got '" + named + "'");
  return *chosen;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = best();
  return chosen;
}

// Returns the name of the instruction set, or null if EFFT_CPU_ISA names an unknown one. efft_kernels/native.py calls
// this function.
extern "C" __attribute__((visibility("default"))) const char* efft_cpu_instruction_set() {
  try {
    return kernels().isa;
  } catch (const std::runtime_error&) {
    return nullptr;
  }
}

}  // namespace efft
