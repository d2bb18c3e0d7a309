// Computes H = A P, where the number of columns of P and H is the rank: h = x D in the forward pass of a layer, and
// dh = gy G^T in the backward pass. The kernel reads A once for every 128 columns of H, and therefore only once for
// ranks up to 128.
#include <algorithm>

#include "accumulator.cuh"
#include "launch.h"

namespace efft {

namespace {

constexpr int ROWS = 64, WARPS = 4;

template <class T, int RANKS>
using Sums = Accumulator<T, ROWS, RANKS, 128 / sizeof(T), WARPS, 1, Order::outer_first, Order::outer_first>;

template <class T, int RANKS>
struct Layout {
  using Tiles = Sums<T, RANKS>;
  static constexpr int STAGES = RANKS < 128 ? 3 : 2;  // number of buffers in a ring, limited by the shared memory
  static constexpr int STAGE = Tiles::A::BYTES + Tiles::B::BYTES;
  static constexpr int BYTES = STAGES * STAGE;
};

template <class T, int RANKS, bool DEPENDENT>
__global__ void __launch_bounds__(WARPS * 32) project_kernel(const __grid_constant__ Project op) {
  if constexpr (DEPENDENT) {
    start_next_kernel();
    wait_for_kernel_in_front();
  }
  using Memory = Layout<T, RANKS>;
  using Tiles = typename Memory::Tiles;
  constexpr int K = Tiles::K, STAGES = Memory::STAGES;
  const int64_t blocks_m = (op.M + ROWS - 1) / ROWS, sample = blockIdx.x / blocks_m;
  const int64_t m = blockIdx.x % blocks_m * ROWS, r = static_cast<int64_t>(blockIdx.y) * RANKS;
  const Source<T> A = source<T>(op.A, sample, op.M, op.K);
  const Source<T> P = source<T>(op.P, sample, op.R, op.K);

  unsigned char* const shared = shared_memory();
  const auto left = [&](int64_t step) {
    return typename Tiles::A{reinterpret_cast<T*>(shared + step % STAGES * Memory::STAGE)};
  };
  const auto right = [&](int64_t step) {
    return typename Tiles::B{reinterpret_cast<T*>(shared + step % STAGES * Memory::STAGE + Tiles::A::BYTES)};
  };
  const int64_t steps = (op.K + K - 1) / K;
  const auto fetch_step = [&](int64_t step) {
    if (step < steps) {
      fetch<Tiles::THREADS>(left(step), A, m, step * K);
      fetch<Tiles::THREADS>(right(step), P, r, step * K);
    }
    commit_copies();
  };

  for (int64_t step = 0; step < STAGES - 1; ++step) fetch_step(step);
  Tiles sums;
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    // After this barrier, the tiles of this step have arrived, and no thread reads the tiles of the previous step any
    // more. The next line starts the copies that overwrite those tiles.
    __syncthreads();
    fetch_step(step + STAGES - 1);
    sums.add(left(step), right(step));
  }
  sums.each_pair([&](int row, int column, float first, float second) {
    const int64_t place = sample * op.H.sample + (m + row) * op.H.row + r + column;
    if (m + row < op.M && r + column < op.R) write_pair(op.H.data, op.H.type, place, first, second);
  });
}

template <class T, int RANKS>
cudaError_t launch_ranks(const Project& op, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(op.samples * ceil_div(op.M, ROWS)),
      static_cast<unsigned>(std::max<int64_t>(ceil_div(op.R, RANKS), 1)));
  const LaunchShape shape{grid, WARPS * 32, 1, generation() >= 2};
  return shape.dependent ? launch<project_kernel<T, RANKS, true>, Layout<T, RANKS>::BYTES>(shape, stream, op)
                         : launch<project_kernel<T, RANKS, false>, Layout<T, RANKS>::BYTES>(shape, stream, op);
}

template <class T>
cudaError_t launch_type(const Project& op, cudaStream_t stream) {
  if (op.R <= 32) return launch_ranks<T, 32>(op, stream);
  if (op.R <= 64) return launch_ranks<T, 64>(op, stream);
  return launch_ranks<T, 128>(op, stream);
}

}  // namespace

cudaError_t project(const Project& op, cudaStream_t stream) {
  if (op.samples * op.M == 0) return cudaSuccess;
  switch (op.H.type) {
    case Type::float32:
      return launch_type<float>(op, stream);
    case Type::bfloat16:
      return launch_type<bf16>(op, stream);
    default:
      return launch_type<fp16>(op, stream);
  }
}

}  // namespace efft
