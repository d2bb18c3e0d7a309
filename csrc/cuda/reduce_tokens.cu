// Computes the gradients of the factors of a layer, dG = h^T gy and dD = x^T dh, which are sums over all tokens. x is
// the input of the layer, gy is the gradient of its output, h = x D, and dh = gy G^T. The sums are in fp32. Their
// order depends only on the sizes and on the model of the GPU, so that equal calls give equal results.
//
// One kernel computes both products. The tokens are divided into as many ranges ("splits") as are needed to fill the
// GPU, but at most into one range per 256 tokens. Every block multiplies 64 columns of gy or x by up to 128 columns of
// h or dh, for the tokens of one range. gy and x are therefore read once for every 128 columns of h or dh. The sums of
// a block stay in registers until it writes them as partial sums. A second, small kernel adds the partial sums of the
// ranges in order and rounds once. Therefore no atomic additions are needed. If EFFT_SM90_GENERATION selects newer
// kernels and the GPU can execute them, reduce_tokens_sm90.cu computes the sums instead.
#include <algorithm>

#include "accumulator.cuh"
#include "launch.h"
#include "reduce_tokens_sm90.h"

namespace efft {

namespace {

// This was the fastest of nine measured configurations on an H100, for bf16 and rank 32.
constexpr int COLUMNS = 64, STAGES = 4, WARPS = 4;

// The number of tokens that one step of the main loop processes.
template <class T>
constexpr int TOKENS = 128 / sizeof(T);

template <class T, int RANKS>
using Sums = Accumulator<T, COLUMNS, RANKS, TOKENS<T>, WARPS, 1, Order::sum_first, Order::sum_first>;

template <class T, int RANKS>
struct Layout {
  using Tiles = Sums<T, RANKS>;
  static constexpr int STAGE = Tiles::A::BYTES + Tiles::B::BYTES;
  static constexpr int BYTES = STAGES * STAGE;
};

// Returns the number of tokens in one range, rounded up so that a range consists of full steps for every type T.
__host__ __device__ inline int64_t range(int64_t tokens, int64_t splits) {
  constexpr int64_t whole = TOKENS<uint16_t>;
  return ((tokens + splits - 1) / splits + whole - 1) / whole * whole;
}

// Computes the product wide^T thin over tokens begin .. end - 1, for 64 columns of `wide` (gy or x), from `column` on,
// and RANKS columns of `thin` (h or dh), from `rank` on. Calls f(column, rank, sum) for each element of the product.
template <class T, int RANKS, class F>
__device__ void sum_over_tokens(const Source<T>& wide, const Source<T>& thin, int64_t begin, int64_t end,
    int64_t column, int64_t rank, const F& f) {
  using Memory = Layout<T, RANKS>;
  using Tiles = typename Memory::Tiles;
  unsigned char* const shared = shared_memory();
  const auto left = [&](int64_t step) {
    return typename Tiles::A{reinterpret_cast<T*>(shared + step % STAGES * Memory::STAGE)};
  };
  const auto right = [&](int64_t step) {
    return typename Tiles::B{reinterpret_cast<T*>(shared + step % STAGES * Memory::STAGE + Tiles::A::BYTES)};
  };
  const int64_t steps = begin < end ? (end - begin + TOKENS<T> - 1) / TOKENS<T> : 0;
  const auto fetch_step = [&](int64_t step) {
    if (step < steps) {
      fetch<Tiles::THREADS>(left(step), wide, begin + step * TOKENS<T>, column);
      fetch<Tiles::THREADS>(right(step), thin, begin + step * TOKENS<T>, rank);
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
  sums.each_pair([&](int c, int r, float first, float second) {
    if (column + c >= wide.columns) return;
    if (rank + r < thin.columns) f(column + c, rank + r, first);
    if (rank + r + 1 < thin.columns) f(column + c, rank + r + 1, second);
  });
}

template <class T, int RANKS>
__global__ void __launch_bounds__(WARPS * 32) reduce_tokens_kernel(const __grid_constant__ ReduceTokens op) {
  const int64_t blocks_G = (op.d_out + COLUMNS - 1) / COLUMNS, split = blockIdx.y;
  const int64_t tokens = range(op.tokens, op.splits), begin = split * tokens;
  const int64_t end = begin + tokens < op.tokens
                          ? begin + tokens
                          : op.tokens;  // the sources below end here, so tiles contain zeros beyond the range
  const int64_t rank = static_cast<int64_t>(blockIdx.z) * RANKS, size_G = op.rank * op.d_out;
  float* const partial_G = op.partials + split * (size_G + op.d_in * op.rank);
  float* const partial_D = partial_G + size_G;
  if (blockIdx.x < blocks_G) {
    const Source<T> gy = source<T>(op.gy, 0, end, op.d_out), h = source<T>(op.h, 0, end, op.rank);
    sum_over_tokens<T, RANKS>(gy, h, begin, end, static_cast<int64_t>(blockIdx.x) * COLUMNS, rank,
        [&](int64_t column, int64_t r, float sum) { partial_G[r * op.d_out + column] = sum; });
  } else {
    const Source<T> x = source<T>(op.x, 0, end, op.d_in), dh = source<T>(op.dh, 0, end, op.rank);
    sum_over_tokens<T, RANKS>(x, dh, begin, end, (blockIdx.x - blocks_G) * COLUMNS, rank,
        [&](int64_t column, int64_t r, float sum) { partial_D[column * op.rank + r] = sum; });
  }
}

constexpr int FINISH_THREADS = 256;

__global__ void __launch_bounds__(FINISH_THREADS) finish_kernel(const __grid_constant__ ReduceTokens op) {
  const int64_t size_G = op.rank * op.d_out, size = size_G + op.d_in * op.rank;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * FINISH_THREADS + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int64_t split = 0; split < op.splits; ++split) sum += op.partials[split * size + i];
  if (i < size_G)
    write(op.dG, op.factors_G, i, sum);
  else
    write(op.dD, op.factors_D, i - size_G, sum);
}

int64_t column_blocks(const ReduceTokens& op) {
  return ceil_div(op.d_out, COLUMNS) + ceil_div(op.d_in, COLUMNS);
}

template <class T, int RANKS>
cudaError_t launch_ranks(const ReduceTokens& op, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(column_blocks(op)), static_cast<unsigned>(op.splits),
      static_cast<unsigned>(ceil_div(op.rank, RANKS)));
  return launch<reduce_tokens_kernel<T, RANKS>, Layout<T, RANKS>::BYTES>(grid, WARPS * 32, stream, op);
}

template <class T>
cudaError_t launch_type(const ReduceTokens& op, cudaStream_t stream) {
  if (op.rank <= 32) return launch_ranks<T, 32>(op, stream);
  if (op.rank <= 64) return launch_ranks<T, 64>(op, stream);
  return launch_ranks<T, 128>(op, stream);
}

}  // namespace

bool reduce_tokens_finishes() {
  return generation() >= 2;
}

int64_t reduce_tokens_splits(const ReduceTokens& op) {
  const int64_t wanted = ceil_div(2 * multiprocessors(), std::max<int64_t>(column_blocks(op), 1));
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(ceil_div(op.tokens, 4 * TOKENS<uint16_t>), 1));
}

namespace {

cudaError_t reduce_layer(const ReduceTokens& op, cudaStream_t stream) {
  const int64_t size = op.rank * (op.d_out + op.d_in);
  if (size == 0) return cudaSuccess;
  const Type type = op.d_in ? op.dh.type : op.h.type;
  const cudaError_t error = type == Type::float32    ? launch_type<float>(op, stream)
                            : type == Type::bfloat16 ? launch_type<bf16>(op, stream)
                                                     : launch_type<fp16>(op, stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(size, FINISH_THREADS)));
  return launch<finish_kernel>(grid, FINISH_THREADS, stream, op);
}

}  // namespace

cudaError_t reduce_tokens(const Reductions& all, cudaStream_t stream) {
#ifdef EFFT_SM90
  if (generation() >= 2) return reduce_tokens_sm90(all, stream);
#endif
  for (int i = 0; i < all.count; ++i) {
    const cudaError_t error = reduce_layer(all.of[i], stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace efft
