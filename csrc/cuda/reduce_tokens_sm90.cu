// Computes dG = h^T gy, dD = x^T dh, db, dgamma and dbeta, which are all the sums over tokens that a layer needs, in
// one launch. This is the second generation of reduce_tokens.cu, for compute capability 9.0.
//
// The tokens are divided into ranges ("splits"). Every block processes a group of 64 columns of gy, x or da in one
// range, and the blocks of one group form a cluster. Each block first leaves its sums in its shared memory. Then every
// block adds up some of the elements over all blocks of the cluster, in the order of the ranges, and rounds once.
// Therefore no partial sums go through global memory, and no addition is atomic.
#include <algorithm>

#include "accumulator.cuh"
#include "launch.h"
#include "reduce_tokens_sm90.h"

namespace efft {

namespace {

constexpr int COLUMNS = 64, STAGES = 4, WARPS = 4, THREADS = WARPS * 32;
constexpr int64_t MOST_SPLITS = 8;     // the largest cluster that is portable across GPUs
constexpr int64_t LEAST_TOKENS = 256;  // the least number of tokens in a range
// The length of a row of sums in shared memory. It has one element more than columns, which puts a column of sums in
// different banks.
constexpr int ROW = COLUMNS + 1;

// The number of tokens that one step of the main loop processes.
template <class T>
constexpr int TOKENS = 128 / sizeof(T);

template <class T, int RANKS>
using Sums = Accumulator<T, COLUMNS, RANKS, TOKENS<T>, WARPS, 1, Order::sum_first, Order::sum_first>;

// The number of elements that a thread reads at a time.
template <class T>
constexpr int EACH = 16 / sizeof(T);
template <class T>
struct alignas(16) Elements {
  T values[EACH<T>];
};

// ACROSS threads read one row of 64 columns, so that a block reads DOWN rows at a time.
template <class T>
constexpr int ACROSS = COLUMNS / EACH<T>;
template <class T>
constexpr int DOWN = THREADS / ACROSS<T>;

template <class T, int RANKS>
struct Layout {
  using Tiles = Sums<T, RANKS>;
  static constexpr int STAGE = Tiles::A::BYTES + Tiles::B::BYTES;
  // After the last step, the sums replace the copies in shared memory: one row per rank, one row for the sums of the
  // columns, and the parts of the latter that different threads have added up.
  static constexpr int ROWS = RANKS + 1, PARTS = 2 * DOWN<T>;
  static constexpr int BYTES = std::max(STAGES * STAGE, (ROWS + PARTS) * ROW * 4);
};

// The columns and tokens over which one block sums.
struct Range {
  int64_t column, begin, end;  // first column; tokens begin .. end - 1
  uint32_t split, splits;
};

// Computes one row of sums by adding the rows of `parts` [DOWN, ROW] in order.
template <class T>
__device__ void add_parts(float* row, const float* parts) {
  const int column = static_cast<int>(threadIdx.x);
  if (column >= COLUMNS) return;
  float sum = 0;
  for (int i = 0; i < DOWN<T>; ++i) sum += parts[i * ROW + column];
  row[column] = sum;
}

// Computes thin^T wide over this block's tokens in `sums` [RANKS, ROW]. If `adds` is set, the next row receives the
// sums of the columns of `wide`.
template <class T, int RANKS>
__device__ void sum_products(
    const Source<T>& wide, const Source<T>& thin, const Range& range, int64_t rank, bool adds, float* sums) {
  using Memory = Layout<T, RANKS>;
  using Tiles = typename Memory::Tiles;
  unsigned char* const shared = shared_memory();
  const auto left = [&](int64_t step) {
    return typename Tiles::A{reinterpret_cast<T*>(shared + step % STAGES * Memory::STAGE)};
  };
  const auto right = [&](int64_t step) {
    return typename Tiles::B{reinterpret_cast<T*>(shared + step % STAGES * Memory::STAGE + Tiles::A::BYTES)};
  };
  const int64_t steps = range.begin < range.end ? (range.end - range.begin + TOKENS<T> - 1) / TOKENS<T> : 0;
  const auto fetch_step = [&](int64_t step) {
    if (step < steps) {
      fetch<THREADS>(left(step), wide, range.begin + step * TOKENS<T>, range.column);
      fetch<THREADS>(right(step), thin, range.begin + step * TOKENS<T>, rank);
    }
    commit_copies();
  };
  const int across = static_cast<int>(threadIdx.x) % ACROSS<T>, down = static_cast<int>(threadIdx.x) / ACROSS<T>;
  float columns[EACH<T>] = {};
  for (int64_t step = 0; step < STAGES - 1; ++step) fetch_step(step);
  Tiles product;
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // the tiles of this step have arrived, and no thread reads the previous tiles
    fetch_step(step + STAGES - 1);
    product.add(left(step), right(step));
    if (!adds) continue;
#pragma unroll
    for (int row = 0; row < TOKENS<T>; row += DOWN<T>) {
      const auto values = *reinterpret_cast<const Elements<T>*>(left(step).chunk(row + down, across));
#pragma unroll
      for (int i = 0; i < EACH<T>; ++i) columns[i] += widen(values.values[i]);
    }
  }
  __syncthreads();  // no thread reads the last tiles any more
  product.each_pair([&](int c, int r, float first, float second) {
    sums[r * ROW + c] = first;
    sums[(r + 1) * ROW + c] = second;
  });
  if (!adds) return;
  float* const parts = sums + Memory::ROWS * ROW;
#pragma unroll
  for (int i = 0; i < EACH<T>; ++i) parts[down * ROW + across * EACH<T> + i] = columns[i];
  __syncthreads();
  add_parts<T>(sums + RANKS * ROW, parts);
}

// Loads elements at .. at + N - 1 of a row as floats, and sets those beyond the last column to zero. The row must begin
// at a multiple of 16 bytes.
template <class X, int N>
__device__ void load(float (&to)[N], const X* row, int64_t at, int64_t columns) {
#pragma unroll
  for (int first = 0; first < N; first += EACH<X>) {
    if (at + first + EACH<X> <= columns) {
      const auto values = *reinterpret_cast<const Elements<X>*>(row + at + first);
#pragma unroll
      for (int i = 0; i < EACH<X>; ++i) to[first + i] = widen(values.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < EACH<X>; ++i) to[first + i] = at + first + i < columns ? widen(row[at + first + i]) : 0.0f;
    }
  }
}

// Computes the sums of the columns of `of` in row 0 of `sums`. If `z` is given, row 1 receives the sums of `of` times
// the normalized z.
template <class T>
__device__ void sum_columns(
    const Matrix& of, const Matrix& z, const Norm& norm, int64_t columns, const Range& range, float* sums) {
  constexpr int N = EACH<T>;
  const int across = static_cast<int>(threadIdx.x) % ACROSS<T>, down = static_cast<int>(threadIdx.x) / ACROSS<T>;
  const int64_t column = range.column + across * N;
  float plain[N] = {}, times_z[N] = {};
#pragma unroll 4
  for (int64_t token = range.begin + down; token < range.end; token += DOWN<T>) {
    float values[N], at[N];
    load<T>(values, static_cast<const T*>(of.data) + token * of.row, column, columns);
    if (z.data) {
      if (z.type == Type::float32)
        load<float>(at, static_cast<const float*>(z.data) + token * z.row, column, columns);
      else
        load<T>(at, static_cast<const T*>(z.data) + token * z.row, column, columns);
      const float mean = norm.mean[token], rstd = norm.rstd[token];
      // Beyond the row, values[i] is zero.
#pragma unroll
      for (int i = 0; i < N; ++i) times_z[i] += values[i] * ((at[i] - mean) * rstd);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) plain[i] += values[i];
  }
  float* const parts = sums + 2 * ROW;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    parts[down * ROW + across * N + i] = plain[i];
    parts[(DOWN<T> + down) * ROW + across * N + i] = times_z[i];
  }
  __syncthreads();
  add_parts<T>(sums, parts);
  add_parts<T>(sums + ROW, parts + DOWN<T> * ROW);
}

// Adds the sums of all blocks of the cluster in the order of their tokens, and calls f(row, column, sum) for the
// elements of the first `rows` rows. Every element is passed to one thread of one block. Adjacent threads get adjacent
// columns or, if `by_rows` is set, adjacent rows.
template <class F>
__device__ void add_blocks(const float* sums, int rows, const Range& range, bool by_rows, const F& f) {
  synchronize_cluster();  // the sums of all blocks are complete
  const int first = static_cast<int>(range.split) * THREADS + static_cast<int>(threadIdx.x);
  for (int i = first; i < rows * COLUMNS; i += static_cast<int>(range.splits) * THREADS) {
    const int row = by_rows ? i % rows : i / COLUMNS, column = by_rows ? i / rows : i % COLUMNS;
    float sum = 0;
    for (uint32_t block = 0; block < range.splits; ++block) sum += read_shared_of(block, sums + row * ROW + column);
    f(row, range.column + column, sum);
  }
  synchronize_cluster();  // no block reads the sums of this block any more
}

// The number of groups of 64 columns for each result.
struct Groups {
  int64_t dG, dD, db, norm;

  __host__ __device__ explicit Groups(const ReduceTokens& op) {
    const auto of = [](int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; };
    dG = of(op.d_out);
    dD = of(op.d_in);
    db = op.d_out ? 0 : of(op.summed_out);  // the blocks for dG read gy and compute db as well
    norm = of(op.summed_in);
  }
  __host__ __device__ int64_t count() const { return dG + dD + db + norm; }
};

template <class T, int RANKS>
__global__ void __launch_bounds__(THREADS) reduce_tokens_sm90_kernel(const __grid_constant__ ReduceTokens op) {
  start_next_kernel();
  wait_for_kernel_in_front();
  const Groups groups(op);
  const auto splits = static_cast<uint32_t>(op.splits);
  int64_t group = blockIdx.x / splits;
  constexpr int64_t whole = TOKENS<T>;
  const int64_t tokens = ((op.tokens + splits - 1) / splits + whole - 1) / whole * whole;
  const int64_t rank = static_cast<int64_t>(blockIdx.y) * RANKS;
  Range range{0, 0, 0, blockIdx.x % splits, splits};
  range.begin = range.split * tokens < op.tokens ? range.split * tokens : op.tokens;
  range.end = range.begin + tokens < op.tokens ? range.begin + tokens : op.tokens;
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const int ranks = op.rank - rank < RANKS ? static_cast<int>(op.rank - rank) : RANKS;

  if (group < groups.dG) {
    range.column = group * COLUMNS;
    const Source<T> gy = source<T>(op.gy, 0, range.end, op.d_out), h = source<T>(op.h, 0, range.end, op.rank);
    const bool adds = op.summed_out > 0 && rank == 0;
    sum_products<T, RANKS>(gy, h, range, rank, adds, sums);
    add_blocks(sums, adds ? RANKS + 1 : ranks, range, false, [&](int r, int64_t column, float sum) {
      if (column >= op.d_out) return;
      if (r < ranks) write(op.dG, op.factors_G, (rank + r) * op.d_out + column, sum);
      if (r == RANKS) op.db[column] = sum;
    });
    return;
  }
  group -= groups.dG;
  if (group < groups.dD) {
    range.column = group * COLUMNS;
    const Source<T> x = source<T>(op.x, 0, range.end, op.d_in), dh = source<T>(op.dh, 0, range.end, op.rank);
    sum_products<T, RANKS>(x, dh, range, rank, false, sums);
    add_blocks(sums, ranks, range, true, [&](int r, int64_t column, float sum) {
      if (column < op.d_in) write(op.dD, op.factors_D, column * op.rank + rank + r, sum);
    });
    return;
  }
  if (rank > 0) return;  // all blocks of the cluster return, because these sums do not depend on the rank
  group -= groups.dD;
  const bool of_gy = group < groups.db;
  range.column = (of_gy ? group : group - groups.db) * COLUMNS;
  if (of_gy) {
    sum_columns<T>(op.gy, {}, {}, op.summed_out, range, sums);
    add_blocks(sums, 1, range, false, [&](int, int64_t column, float sum) {
      if (column < op.summed_out) op.db[column] = sum;
    });
  } else {
    sum_columns<T>(op.da, op.dgamma ? op.z : Matrix{}, op.norm, op.summed_in, range, sums);
    add_blocks(sums, 2, range, false, [&](int row, int64_t column, float sum) {
      if (column >= op.summed_in) return;
      if (row == 0 && op.dbeta) write(op.dbeta, op.type_of_dbeta, column, sum);
      if (row == 1 && op.dgamma) write(op.dgamma, op.type_of_dgamma, column, sum);
    });
  }
}

template <class T, int RANKS>
cudaError_t launch_ranks(const ReduceTokens& op, cudaStream_t stream) {
  const int64_t ranks = std::max<int64_t>(ceil_div(op.d_out || op.d_in ? op.rank : 0, RANKS), 1);
  const dim3 grid(static_cast<unsigned>(Groups(op).count() * op.splits), static_cast<unsigned>(ranks));
  const LaunchShape shape{grid, THREADS, static_cast<unsigned>(op.splits), true};
  return launch<reduce_tokens_sm90_kernel<T, RANKS>, Layout<T, RANKS>::BYTES>(shape, stream, op);
}

template <class T>
cudaError_t launch_type(const ReduceTokens& op, cudaStream_t stream) {
  if (op.rank <= 32) return launch_ranks<T, 32>(op, stream);
  if (op.rank <= 64) return launch_ranks<T, 64>(op, stream);
  return launch_ranks<T, 128>(op, stream);
}

}  // namespace

int64_t reduce_tokens_splits_sm90(const ReduceTokens& op) {
  const int64_t fill = ceil_div(2 * multiprocessors(), std::max<int64_t>(Groups(op).count(), 1));
  const int64_t most = std::min(MOST_SPLITS, std::max<int64_t>(ceil_div(op.tokens, LEAST_TOKENS), 1));
  return std::clamp<int64_t>(fill, 1, most);
}

cudaError_t reduce_tokens_sm90(const ReduceTokens& op, cudaStream_t stream) {
  if (Groups(op).count() == 0) return cudaSuccess;
  const Type type = op.d_in ? op.dh.type : op.d_out ? op.h.type : op.summed_in ? op.da.type : op.gy.type;
  if (type == Type::float32) return launch_type<float>(op, stream);
  return type == Type::bfloat16 ? launch_type<bf16>(op, stream) : launch_type<fp16>(op, stream);
}

}  // namespace efft
