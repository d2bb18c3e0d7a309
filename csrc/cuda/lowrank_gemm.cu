// Computes Y = A B + bias + H T, a matrix product and a rank-r product that are summed in the same accumulator. It
// serves both directions of tt_linear:
//
//   forward    y  = x W^T + b + h G      A = x,  B = W^T, H = h,  T = G
//   backward   dx = gy W + dh D^T        A = gy, B = W,   H = dh, T = D^T
//
// H T is called the tail. It is computed by a few more steps of the main loop, which read H and T instead of A and B.
// These steps use the same buffers and add to the same fp32 sums. Therefore Y is written only once, and no operands are
// concatenated. On GPUs of compute capability 9.0, lowrank_gemm_sm90.cu computes the large 16-bit products instead.
#include "accumulator.cuh"
#include "launch.h"
#include "lowrank_gemm_sm90.h"
#include "tiles.cuh"

namespace efft {

namespace {

// The number of buffers in a block's ring. Up to STAGES - 1 copies are in flight while the block multiplies the
// operands in one buffer. A buffer has at most 16 KiB, so that two blocks with the big tile fit on one multiprocessor
// of sm_80.
constexpr int STAGES = 4;
// Consecutive blocks compute GROUP tiles below each other before they continue with the next column of tiles, so that
// the operands of these tiles stay in the L2 cache.
constexpr int64_t GROUP = 8;

template <class T, int M, int N, int WARPS_M, int WARPS_N, bool TRANSPOSED>
using Sums = Accumulator<T, M, N, 64 / sizeof(T), WARPS_M, WARPS_N, Order::outer_first,
    TRANSPOSED ? Order::outer_first : Order::sum_first>;

// The sample of a block's tile, and the first row and column of the tile.
struct Place {
  int64_t sample, row, column;
};

template <class Sums>
__device__ Place place_of(const LowRankGemm& op, int64_t block) {
  const int64_t of_sample = (op.M + Sums::M - 1) / Sums::M, columns = (op.N + Sums::N - 1) / Sums::N;
  const int64_t rows = op.samples * of_sample, first = block / (GROUP * columns) * GROUP;
  const int64_t height = rows - first < GROUP ? rows - first : GROUP, within = block % (GROUP * columns);
  const int64_t row = first + within % height;
  return {row / of_sample, row % of_sample * Sums::M, within / height * Sums::N};
}

// Adds the bias to two adjacent sums of a row and writes those that lie inside Y.
__device__ void write_sums(
    const LowRankGemm& op, const Place& at, int64_t row, int64_t column, float first, float second) {
  if (row >= op.M || column >= op.N) return;
  const auto finished = [&](float y, int64_t n) { return op.bias.data ? y + read(op.bias, n) : y; };
  const int64_t place = at.sample * op.Y.sample + row * op.Y.row + column;
  const bool both = column + 1 < op.N;
  first = finished(first, column);
  if (both) second = finished(second, column + 1);
  if (both && place % 2 == 0) {
    write_pair(op.Y.data, op.Y.type, place, first, second);
    return;
  }
  write(op.Y.data, op.Y.type, place, first);
  if (both) write(op.Y.data, op.Y.type, place + 1, second);
}

// Returns `one` if `first` is true, else `other`. It selects field by field, so that the compiler keeps both sources in
// registers.
template <class T>
__device__ Source<T> select(bool first, const Source<T>& one, const Source<T>& other) {
  return {first ? one.data : other.data, first ? one.row : other.row, first ? one.rows : other.rows,
      first ? one.columns : other.columns};
}

template <class T, class Sums>
__global__ void __launch_bounds__(Sums::THREADS) lowrank_gemm_kernel(const __grid_constant__ LowRankGemm op) {
  constexpr int K = Sums::K;
  const Place at = place_of<Sums>(op, blockIdx.x);
  constexpr bool transposed = Sums::ORDER == Order::outer_first;
  const Source<T> A = source<T>(op.A, at.sample, op.M, op.K), H = source<T>(op.H, at.sample, op.M, op.R);
  const Source<T> B = source<T>(op.B, 0, transposed ? op.N : op.K, transposed ? op.K : op.N);
  const Source<T> tail = source<T>(op.T, at.sample, transposed ? op.N : op.R, transposed ? op.R : op.N);

  T* const shared = reinterpret_cast<T*>(shared_memory());
  constexpr int SIZE_A = Sums::M * K, STAGE = SIZE_A + Sums::N * K;
  const auto left = [&](int64_t step) { return typename Sums::A{shared + step % STAGES * STAGE}; };
  const auto right = [&](int64_t step) { return typename Sums::B{shared + step % STAGES * STAGE + SIZE_A}; };
  const int64_t main_steps = (op.K + K - 1) / K, steps = main_steps + (op.R + K - 1) / K;
  const auto fetch_step = [&](int64_t step) {
    if (step < steps) {
      const bool is_main = step < main_steps;
      const int64_t k = (is_main ? step : step - main_steps) * K;
      fetch<Sums::THREADS>(left(step), select(is_main, A, H), at.row, k);
      const Source<T> from = select(is_main, B, tail);
      fetch<Sums::THREADS>(right(step), from, transposed ? at.column : k, transposed ? k : at.column);
    }
    commit_copies();
  };

  Sums sums;
  for (int64_t step = 0; step < STAGES - 1; ++step) fetch_step(step);
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // the copies of all threads for this step have arrived, and no thread reads the previous buffer
    fetch_step(step + STAGES - 1);
    sums.add(left(step), right(step));
  }
  sums.each_pair([&](int row, int column, float first, float second) {
    write_sums(op, at, at.row + row, at.column + column, first, second);
  });
}

template <class T, class Sums>
cudaError_t launch_tiles(const LowRankGemm& op, cudaStream_t stream) {
  const int64_t blocks = op.samples * ceil_div(op.M, Sums::M) * ceil_div(op.N, Sums::N);
  return launch<lowrank_gemm_kernel<T, Sums>, STAGES*(Sums::A::BYTES + Sums::B::BYTES)>(
      dim3(static_cast<unsigned>(blocks)), Sums::THREADS, stream, op);
}

template <class T, bool TRANSPOSED>
cudaError_t launch_type(const LowRankGemm& op, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    return launch_tiles<T, Sums<T, 64, 64, 2, 2, TRANSPOSED>>(op, stream);
  } else {
    // With the big tile, each operand is read fewer times. With the small tile, a smaller output fills the GPU.
    const bool fills = op.samples * ceil_div(op.M, 128) * ceil_div(op.N, 128) >= multiprocessors();
    if (fills) return launch_tiles<T, Sums<T, 128, 128, 2, 4, TRANSPOSED>>(op, stream);
    return launch_tiles<T, Sums<T, 64, 64, 2, 2, TRANSPOSED>>(op, stream);
  }
}

template <class T>
cudaError_t launch_order(const LowRankGemm& op, cudaStream_t stream) {
  return op.transposed ? launch_type<T, true>(op, stream) : launch_type<T, false>(op, stream);
}

}  // namespace

namespace {

bool runs_on_sm90([[maybe_unused]] const LowRankGemm& op) {
#ifdef EFFT_SM90
  return is_sm90() && lowrank_gemm_sm90_takes(op);
#else
  return false;
#endif
}

}  // namespace

bool lowrank_gemm_makes_h([[maybe_unused]] const LowRankGemm& op) {
#ifdef EFFT_SM90
  return runs_on_sm90(op) && lowrank_gemm_sm90_makes_h(op);
#else
  return false;
#endif
}

bool lowrank_gemm_computes_gelu([[maybe_unused]] const LowRankGemm& op) {
#ifdef EFFT_SM90
  return runs_on_sm90(op) && lowrank_gemm_sm90_computes_gelu(op);
#else
  return false;
#endif
}

cudaError_t lowrank_gemm(const LowRankGemm& op, cudaStream_t stream) {
  if (op.samples * op.M * op.N == 0) return cudaSuccess;
  if (op.gelu.which != Producer::none && !lowrank_gemm_computes_gelu(op)) return cudaErrorInvalidValue;
#ifdef EFFT_SM90
  if (runs_on_sm90(op)) return lowrank_gemm_sm90(op, stream);
#endif
  switch (op.A.type) {
    case Type::float32:
      return launch_order<float>(op, stream);
    case Type::bfloat16:
      return launch_order<bf16>(op, stream);
    default:
      return launch_order<fp16>(op, stream);
  }
}

}  // namespace efft
