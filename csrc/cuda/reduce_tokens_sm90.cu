// Computes in one launch all sums over tokens that the backward passes of one or several adapted layers need:
//
// - dG = h^T gy and dD = x^T dh are the gradients of the factors D and G. x is the input of the layer, gy is the
//   gradient of its output, h = x D, and dh = gy G^T.
// - db, the gradient of the bias, is the sum of gy.
// - dgamma and dbeta are the gradients of the parameters of a layer norm that runs directly before the layer. They are
//   sums over da, the gradient of the norm's output.
//
// This is the second generation of reduce_tokens.cu: it runs on GPUs of compute capability 9.0 if EFFT_SM90_GENERATION
// is 2 or 3.
//
// Blocks form clusters, and a block can read the shared memory of the other blocks in its cluster. Each cluster
// computes the sums for 64 columns of gy, x or da. In a product, it combines them with at most 128 columns of h or dh.
// The tokens are divided into ranges ("splits"), one per block of the cluster. First, each block stores the sums over
// its range in its own shared memory. Then the elements of the result are divided among the blocks. For each of its
// elements, a block adds the sums of all blocks in the order of the ranges, and rounds once. Therefore no partial sums
// go through global memory, and no addition is atomic.
#include <algorithm>

#include "accumulator.cuh"
#include "launch.h"
#include "reduce_tokens_sm90.h"

namespace efft {

namespace {

constexpr int COLUMNS = 64, STAGES = 4, WARPS = 4, THREADS = WARPS * 32;
constexpr int64_t MOST_SPLITS = 8;     // number of blocks in the largest cluster that all of these GPUs support
constexpr int64_t LEAST_TOKENS = 256;  // the number of tokens divided by this, rounded up, limits the number of ranges
// The distance between two rows of sums in shared memory. It is one more than the number of columns, so that the
// elements of a column are in different banks.
constexpr int ROW = COLUMNS + 1;

// The number of tokens that one step of the main loop processes.
template <class T>
constexpr int TOKENS = 128 / sizeof(T);

template <class T, int RANKS>
using Sums = Accumulator<T, COLUMNS, RANKS, TOKENS<T>, WARPS, 1, Order::sum_first, Order::sum_first>;

// The number of elements in 16 bytes, which a thread reads at a time.
template <class T>
constexpr int EACH = 16 / sizeof(T);
template <class T>
struct alignas(16) Elements {
  T values[EACH<T>];
};

// To sum columns, ACROSS threads read one row of 64 columns. Therefore a block reads DOWN rows at a time.
template <class T>
constexpr int ACROSS = COLUMNS / EACH<T>;
template <class T>
constexpr int DOWN = THREADS / ACROSS<T>;

template <class T, int RANKS>
struct Layout {
  using Tiles = Sums<T, RANKS>;
  static constexpr int STAGE = Tiles::A::BYTES + Tiles::B::BYTES;
  // During the main loop, the shared memory contains STAGES buffers for the copied operands. After the last step, it
  // contains RANKS + 1 rows of sums instead: one row of the product per rank, and one row of column sums. After these
  // rows it has room for the parts of column sums, one row for each of the DOWN threads that sum a column. There are
  // two groups of parts, because sum_columns computes two kinds of column sums.
  static constexpr int ROWS = RANKS + 1, PARTS = 2 * DOWN<T>;
  static constexpr int BYTES = std::max(STAGES * STAGE, (ROWS + PARTS) * ROW * 4);
};

// The part of the work that one block does: it sums tokens begin .. end - 1 of 64 columns, from `column` on.
struct Range {
  int64_t column, begin, end;
  uint32_t split, splits;  // the index of the range of tokens, and the number of ranges
};

// Adds the DOWN rows of `parts` [DOWN, ROW] in order, and stores the sums in `row` [ROW].
template <class T>
__device__ void add_parts(float* row, const float* parts) {
  const int column = static_cast<int>(threadIdx.x);
  if (column >= COLUMNS) return;
  float sum = 0;
  for (int i = 0; i < DOWN<T>; ++i) sum += parts[i * ROW + column];
  row[column] = sum;
}

// Computes thin^T wide over this block's range of tokens, for 64 columns of `wide` (gy or x) and RANKS columns, from
// `rank` on, of `thin` (h or dh). The product is stored in the first RANKS rows of `sums` [RANKS + 1, ROW]. If `adds`
// is set, the last row receives the sums of the columns of `wide`.
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
    // After this barrier, the tiles of this step have arrived, and no thread reads the tiles of the previous step any
    // more. The next line starts the copies that overwrite those tiles.
    __syncthreads();
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

// Loads the N elements of a row from element `at` on, converted to floats, and sets those beyond the last column to
// zero. The address of the first element must be a multiple of 16 bytes.
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

// Sums 64 columns of `of` (gy or da) over this block's range of tokens, and stores the sums in row 0 of `sums`. If
// `z`, the input of the layer norm, is given, row 1 receives the sums of `of`, multiplied element by element by
// (z - mean) rstd. Both matrices have `columns` columns.
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
      // Beyond the last column, values[i] is zero, and nothing is added.
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

// Adds the first `rows` rows of `sums` over all blocks of the cluster, in the order of their ranges of tokens, and
// calls f(row, column, sum) for every element. `column` is counted from the first column of the matrix. Each element is
// processed by one thread of one block. Adjacent threads process adjacent columns or, if `by_rows` is set, adjacent
// rows.
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

// The number of groups of 64 columns for each result. `norm` is the number for dgamma and dbeta together.
struct Groups {
  int64_t dG, dD, db, norm;

  __host__ __device__ explicit Groups(const ReduceTokens& op) {
    const auto of = [](int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; };
    dG = of(op.d_out);
    dD = of(op.d_in);
    db = op.d_out ? 0 : of(op.summed_out);  // if dG is needed, its blocks read gy and compute db as well
    norm = of(op.summed_in);
  }
  __host__ __device__ int64_t count() const { return dG + dD + db + norm; }
};

template <class T, int RANKS>
__global__ void __launch_bounds__(THREADS)
    reduce_tokens_sm90_kernel(const __grid_constant__ Reductions all, const uint32_t splits) {
  start_next_kernel();
  wait_for_kernel_in_front();
  // The clusters for the first layer are followed by those for the next layer. `group` is counted within the layer.
  int64_t group = blockIdx.x / splits;
  int layer = 0;
  for (; layer + 1 < all.count && group >= Groups(all.of[layer]).count(); ++layer)
    group -= Groups(all.of[layer]).count();
  const ReduceTokens& op = all.of[layer];
  const Groups groups(op);
  constexpr int64_t whole = TOKENS<T>;
  const int64_t tokens = ((op.tokens + splits - 1) / splits + whole - 1) / whole * whole;
  const int64_t rank = static_cast<int64_t>(blockIdx.y) * RANKS;
  Range range{0, 0, 0, blockIdx.x % splits, splits};
  range.begin = range.split * tokens < op.tokens ? range.split * tokens : op.tokens;
  range.end = range.begin + tokens < op.tokens ? range.begin + tokens : op.tokens;
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const int ranks = op.rank - rank < RANKS ? static_cast<int>(op.rank - rank) : RANKS;
  // The layers may have different ranks. `rank` is the same in all blocks of a cluster. Therefore no block returns here
  // or below while other blocks of its cluster wait for it.
  if (rank > 0 && rank >= op.rank) return;

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
  // The remaining sums do not depend on the rank. Only the clusters for the first ranks compute them.
  if (rank > 0) return;
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

// Returns the number of groups of 64 columns that the launch processes.
int64_t count_groups(const Reductions& all) {
  int64_t count = 0;
  for (int i = 0; i < all.count; ++i) count += Groups(all.of[i]).count();
  return count;
}

// Returns the largest rank of the factors whose gradients are needed, or 0 if none is.
int64_t largest_rank(const Reductions& all) {
  int64_t rank = 0;
  for (int i = 0; i < all.count; ++i)
    if (all.of[i].d_out || all.of[i].d_in) rank = std::max(rank, all.of[i].rank);
  return rank;
}

// Returns the number of ranges of tokens with which the launch fills the GPU. With few tokens, the number is smaller.
int64_t count_splits(const Reductions& all) {
  int64_t tokens = 0;
  for (int i = 0; i < all.count; ++i) tokens = std::max(tokens, all.of[i].tokens);
  const int64_t fill = ceil_div(2 * multiprocessors(), std::max<int64_t>(count_groups(all), 1));
  const int64_t most = std::min(MOST_SPLITS, std::max<int64_t>(ceil_div(tokens, LEAST_TOKENS), 1));
  return std::clamp<int64_t>(fill, 1, most);
}

template <class T, int RANKS>
cudaError_t launch_ranks(const Reductions& all, cudaStream_t stream) {
  const int64_t ranks = std::max<int64_t>(ceil_div(largest_rank(all), RANKS), 1), splits = count_splits(all);
  const dim3 grid(static_cast<unsigned>(count_groups(all) * splits), static_cast<unsigned>(ranks));
  const LaunchShape shape{grid, THREADS, static_cast<unsigned>(splits), true};
  return launch<reduce_tokens_sm90_kernel<T, RANKS>, Layout<T, RANKS>::BYTES>(
      shape, stream, all, static_cast<uint32_t>(splits));
}

template <class T>
cudaError_t launch_type(const Reductions& all, cudaStream_t stream) {
  const int64_t rank = largest_rank(all);
  if (rank <= 32) return launch_ranks<T, 32>(all, stream);
  if (rank <= 64) return launch_ranks<T, 64>(all, stream);
  return launch_ranks<T, 128>(all, stream);
}

// Returns the type of the operands of a layer that needs at least one sum.
Type type_of(const ReduceTokens& op) {
  return op.d_in ? op.dh.type : op.d_out ? op.h.type : op.summed_in ? op.da.type : op.gy.type;
}

}  // namespace

cudaError_t reduce_tokens_sm90(const Reductions& all, cudaStream_t stream) {
  Reductions some;  // the layers that need at least one sum
  for (int i = 0; i < all.count; ++i)
    if (Groups(all.of[i]).count() > 0) some.of[some.count++] = all.of[i];
  if (some.count == 0) return cudaSuccess;
  const Type type = type_of(some.of[0]);
  for (int i = 1; i < some.count; ++i)
    if (type_of(some.of[i]) != type) return cudaErrorInvalidValue;
  if (type == Type::float32) return launch_type<float>(some, stream);
  return type == Type::bfloat16 ? launch_type<bf16>(some, stream) : launch_type<fp16>(some, stream);
}

}  // namespace efft
