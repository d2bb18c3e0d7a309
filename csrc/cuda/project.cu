// H = A P, and out = producer(A) on the way: a product with a narrow right side that reads A once, whatever the rank up
// to 128 (beyond that, once for every 128).
#include <algorithm>

#include "accumulator.cuh"
#include "launch.h"
#include "producers.cuh"

namespace efft {

namespace {

constexpr int ROWS = 64, WARPS = 4;

template <class T, int RANKS>
using Sums = Accumulator<T, ROWS, RANKS, 128 / sizeof(T), WARPS, 1, Order::outer_first, Order::outer_first>;

template <class T, class X, int RANKS, bool PRODUCED>
struct Layout {
  using Tiles = Sums<T, RANKS>;
  using Raw = Tile<X, ROWS, Tiles::K>;
  static constexpr int STAGES = RANKS < 128 ? 3 : 2;  // copies in flight, as far as shared memory goes
  static constexpr int STAGE = Raw::BYTES + Tiles::B::BYTES;
  static constexpr int BYTES = STAGES * STAGE + (PRODUCED ? 2 * Tiles::A::BYTES : 0);
};

// One warp a row. Two reads, the second from the cache: a variance from the mean square would cancel.
template <class X>
__device__ void row_statistics(const Source<X>& from, int64_t first, const Norm& norm) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t row = first + threadIdx.x / 32; row < first + ROWS && row < from.rows; row += WARPS) {
    const X* x = from.data + row * from.row;
    float total = 0, squares = 0;
    for (int64_t k = lane; k < from.columns; k += 32) total += widen(x[k]);
    const float mean = warp_sum(total) / static_cast<float>(from.columns);
    for (int64_t k = lane; k < from.columns; k += 32) squares += (widen(x[k]) - mean) * (widen(x[k]) - mean);
    const float variance = warp_sum(squares) / static_cast<float>(from.columns);
    if (lane == 0) {
      norm.mean[row] = mean;
      norm.rstd[row] = 1.0f / sqrtf(variance + norm.eps);
    }
  }
  __syncthreads();
}

// The part of `out` that this thread has produced.
template <class X, class T, int K>
__device__ void write_tile(const Tile<X, ROWS, K>& raw, const Tile<T, ROWS, K>& tile, const Matrix& out, int64_t rows,
    int64_t columns, int64_t row, int64_t column) {
  each_own_chunk<WARPS * 32>(raw, [&](int r, int c) {
    constexpr int COUNT = Tile<X, ROWS, K>::PER_CHUNK;
    struct alignas(COUNT * sizeof(T)) Elements {
      T values[COUNT];
    };
    const int64_t m = row + r, k = column + c * COUNT;
    if (m >= rows || k >= columns) return;
    const T* from = &tile.at(r, c * COUNT);
    T* to = static_cast<T*>(out.data) + m * out.row + k;  // rows are padded to whole chunks
    *reinterpret_cast<Elements*>(to) = *reinterpret_cast<const Elements*>(from);
  });
}

template <class T, class X, int RANKS, bool PRODUCED>
__global__ void __launch_bounds__(WARPS * 32) project_kernel(const __grid_constant__ Project op) {
  using Memory = Layout<T, X, RANKS, PRODUCED>;
  using Tiles = typename Memory::Tiles;
  constexpr int K = Tiles::K, STAGES = Memory::STAGES;
  const int64_t blocks_m = (op.M + ROWS - 1) / ROWS, sample = blockIdx.x / blocks_m;
  const int64_t m = blockIdx.x % blocks_m * ROWS, r = static_cast<int64_t>(blockIdx.y) * RANKS;
  const Source<X> A = source<X>(op.A, sample, op.M, op.K);
  const Source<T> P = source<T>(op.P, sample, op.R, op.K);

  unsigned char* const shared = shared_memory();
  const auto raw = [&](int64_t step) {
    return typename Memory::Raw{reinterpret_cast<X*>(shared + step % STAGES * Memory::STAGE)};
  };
  const auto right = [&](int64_t step) {
    return typename Tiles::B{reinterpret_cast<T*>(shared + step % STAGES * Memory::STAGE + Memory::Raw::BYTES)};
  };
  const auto left = [&](int64_t step) {
    if constexpr (PRODUCED)
      return typename Tiles::A{reinterpret_cast<T*>(shared + STAGES * Memory::STAGE + step % 2 * Tiles::A::BYTES)};
    else
      return raw(step);
  };
  const int64_t steps = (op.K + K - 1) / K;
  const auto fetch_step = [&](int64_t step) {
    if (step < steps) {
      fetch<Tiles::THREADS>(raw(step), A, m, step * K);
      fetch<Tiles::THREADS>(right(step), P, r, step * K);
    }
    commit_copies();
  };

  for (int64_t step = 0; step < STAGES - 1; ++step) fetch_step(step);
  if (PRODUCED && op.producer == Producer::norm) row_statistics(A, m, op.norm);
  Tiles sums;
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    if constexpr (PRODUCED) {
      produce<Tiles::THREADS>(raw(step), left(step), op.producer, op.norm, A, m, step * K);
      if (blockIdx.y == 0) write_tile(raw(step), left(step), op.out, op.M, op.K, m, step * K);
    }
    __syncthreads();  // this step's tiles are there, and nobody reads the last one's
    fetch_step(step + STAGES - 1);
    sums.add(left(step), right(step));
  }
  sums.each_pair([&](int row, int column, float first, float second) {
    const int64_t place = sample * op.H.sample + (m + row) * op.H.row + r + column;
    if (m + row < op.M && r + column < op.R) write_pair(op.H.data, op.H.type, place, first, second);
  });
}

template <class T, class X, int RANKS, bool PRODUCED>
cudaError_t launch_ranks(const Project& op, cudaStream_t stream) {
  using Memory = Layout<T, X, RANKS, PRODUCED>;
  const dim3 grid(static_cast<unsigned>(op.samples * ceil_div(op.M, ROWS)),
      static_cast<unsigned>(std::max<int64_t>(ceil_div(op.R, RANKS), 1)));
  return launch<Memory::BYTES>(project_kernel<T, X, RANKS, PRODUCED>, grid, WARPS * 32, stream, op);
}

template <class T, class X, bool PRODUCED>
cudaError_t launch_type(const Project& op, cudaStream_t stream) {
  if (op.R <= 32) return launch_ranks<T, X, 32, PRODUCED>(op, stream);
  if (op.R <= 64) return launch_ranks<T, X, 64, PRODUCED>(op, stream);
  return launch_ranks<T, X, 128, PRODUCED>(op, stream);
}

template <class T>
cudaError_t launch_producer(const Project& op, cudaStream_t stream) {
  if (op.producer == Producer::none) return launch_type<T, T, false>(op, stream);
  return op.A.type == op.H.type ? launch_type<T, T, true>(op, stream) : launch_type<T, float, true>(op, stream);
}

}  // namespace

cudaError_t project(const Project& op, cudaStream_t stream) {
  if (op.samples * op.M == 0) return cudaSuccess;
  switch (op.H.type) {
    case Type::float32:
      return launch_producer<float>(op, stream);
    case Type::bfloat16:
      return launch_producer<bf16>(op, stream);
    default:
      return launch_producer<fp16>(op, stream);
  }
}

}  // namespace efft
