// Y = A B + bias + H T by bulk tensor copies (TMA) and warp-group products (WGMMA), in one persistent, warp-specialised
// kernel: a producer warp streams k tiles of (A, B), then of (H, T), through the same buffers; two warp groups multiply
// them into the same sums. What lies beyond the rank, as beyond every edge, TMA fills with zeros.
//
// Blocks come in pairs that take neighbouring rows of one column: each copies half of B's tile, for both.
#include "lowrank_gemm_sm90.h"

// clang-format off: CuTe comes before the rest of CUTLASS, which does not stand alone
#include <cute/tensor.hpp>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>
#include <cutlass/pipeline/sm90_pipeline.hpp>
// clang-format on

#include <algorithm>

#include "launch.h"
#include "producers.cuh"

namespace efft {

namespace {

using namespace cute;  // NOLINT: the library's vocabulary, of this file alone

using Cluster = Shape<_2, _1, _1>;
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128, STAGES = 4;
constexpr int64_t GROUP = 8;  // pairs of row blocks before the next column block, so that operands stay in the L2 cache
constexpr size_t SHARED_OF_SM90 = 227 * 1024;

// Types of a product: T in CUTLASS's spelling, and whether B and T are transposed, [N, K].
template <class T_, bool TRANSPOSED>
struct Product {
  using T = T_;
  using M = _128;
  using N = _256;
  using K = _64;
  static constexpr GMMA::Major MAJOR = TRANSPOSED ? GMMA::Major::K : GMMA::Major::MN;
  using Mma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<T, T, float, Shape<M, N, K>, GMMA::Major::K, MAJOR>(), Layout<Shape<_2, _1, _1>>{}));
  using LayoutA = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<T>{}, Shape<M, K, Int<STAGES>>{}));
  using AtomB = std::conditional_t<TRANSPOSED, GMMA::Layout_K_SW128_Atom<T>, GMMA::Layout_MN_SW128_Atom<T>>;
  using LayoutB = decltype(tile_to_shape(
      AtomB{}, Shape<N, K, Int<STAGES>>{}, std::conditional_t<TRANSPOSED, Step<_1, _2, _3>, Step<_2, _1, _3>>{}));
  using Pipeline = cutlass::PipelineTmaAsync<STAGES>;

  struct alignas(1024) Shared {
    array_aligned<T, cosize_v<LayoutA>, 1024> a;
    array_aligned<T, cosize_v<LayoutB>, 1024> b;
    typename Pipeline::SharedStorage pipeline;
  };

  static auto copy_a(const Matrix& of, int rows, int columns) {
    const auto layout = make_layout(make_shape(rows, columns), make_stride(of.row, _1{}));
    return make_tma_copy(SM90_TMA_LOAD{}, make_tensor(make_gmem_ptr(static_cast<const T*>(of.data)), layout),
        LayoutA{}(_, _, 0), Shape<M, K>{}, _1{});
  }
  static auto copy_b(const Matrix& of, int columns, int depth) {
    const auto strides = [&] {
      if constexpr (TRANSPOSED)
        return make_stride(of.row, _1{});
      else
        return make_stride(_1{}, of.row);
    }();
    const auto layout = make_layout(make_shape(columns, depth), strides);
    return make_tma_copy(SM90_TMA_LOAD_MULTICAST{}, make_tensor(make_gmem_ptr(static_cast<const T*>(of.data)), layout),
        LayoutB{}(_, _, 0), Shape<N, K>{}, size<0>(Cluster{}));
  }
  using CopyA = decltype(copy_a({}, 0, 0));
  using CopyB = decltype(copy_b({}, 0, 0));
};

template <class P>
struct Operands {
  typename P::CopyA A, H;
  typename P::CopyB B, T;
};

// The tiles of one block: those of its pair, a row block each.
struct Tiles {
  int pairs, columns;  // of the output
  int main_steps, steps;

  template <class P>
  static Tiles of(const LowRankGemm& op) {
    const auto blocks = [](int64_t size, int64_t block) { return static_cast<int>(ceil_div(size, block)); };
    const int main_steps = blocks(op.K, typename P::K{});
    return {blocks(op.M, 2 * typename P::M{}), blocks(op.N, typename P::N{}), main_steps,
        main_steps + blocks(op.R, typename P::K{})};
  }
  __host__ __device__ int count() const { return pairs * columns; }
  // (row block, column block)
  __device__ void place(int tile, int& m, int& n) const {
    const int first = tile / (static_cast<int>(GROUP) * columns) * static_cast<int>(GROUP);
    const int height = min(pairs - first, static_cast<int>(GROUP)), within = tile % (static_cast<int>(GROUP) * columns);
    m = 2 * (first + within % height) + static_cast<int>(block_rank_in_cluster());
    n = within / height;
  }
};

template <class P>
__device__ void produce_tiles(const Operands<P>& from, const LowRankGemm& op, const Tiles& tiles,
    typename P::Shared& shared, typename P::Pipeline& pipeline) {
  const Tensor a = make_tensor(make_smem_ptr(shared.a.data()), typename P::LayoutA{});
  const Tensor b = make_tensor(make_smem_ptr(shared.b.data()), typename P::LayoutB{});
  const auto part_a = from.A.get_slice(0), part_h = from.H.get_slice(0);
  const auto part_b = from.B.get_slice(block_rank_in_cluster()), part_t = from.T.get_slice(block_rank_in_cluster());
  const auto cut = [](const auto& copy, const auto& part, int outer, int depth, auto block, int index) {
    return part.partition_S(local_tile(copy.get_tma_tensor(make_shape(outer, depth)), block, make_coord(index, _)));
  };
  constexpr uint16_t both = 3;
  const int M = static_cast<int>(op.M), N = static_cast<int>(op.N), K = static_cast<int>(op.K),
            R = static_cast<int>(op.R);
  const Shape<typename P::M, typename P::K> block_a;
  const Shape<typename P::N, typename P::K> block_b;
  auto to_a = part_a.partition_D(a);
  auto to_b = part_b.partition_D(b);

  auto write = cutlass::make_producer_start_state<typename P::Pipeline>();
  for (int tile = static_cast<int>(blockIdx.x) / 2; tile < tiles.count(); tile += static_cast<int>(gridDim.x) / 2) {
    int m, n;
    tiles.place(tile, m, n);
    const auto from_a = cut(from.A, part_a, M, K, block_a, m);
    const auto from_h = cut(from.H, part_h, M, R, block_a, m);
    const auto from_b = cut(from.B, part_b, N, K, block_b, n);
    const auto from_t = cut(from.T, part_t, N, R, block_b, n);
    for (int step = 0; step < tiles.steps; ++step, ++write) {
      pipeline.producer_acquire(write);
      auto* const barrier = pipeline.producer_get_barrier(write);
      const int stage = write.index();
      if (step < tiles.main_steps) {
        copy(from.A.with(*barrier), from_a(_, _, _, step), to_a(_, _, _, stage));
        copy(from.B.with(*barrier, both), from_b(_, _, _, step), to_b(_, _, _, stage));
      } else {
        copy(from.H.with(*barrier), from_h(_, _, _, step - tiles.main_steps), to_a(_, _, _, stage));
        copy(from.T.with(*barrier, both), from_t(_, _, _, step - tiles.main_steps), to_b(_, _, _, stage));
      }
    }
  }
  pipeline.producer_tail(write);  // the other block of the pair may still copy into this one's memory
}

// Bias and slope in fp32, then rounded once; op.N is even, so that two neighbours are written together.
template <class Out, class Sums, class Places>
__device__ void write_tile(const LowRankGemm& op, int64_t row, int64_t column, const Sums& sums, const Places& places) {
  Out* const Y = static_cast<Out*>(op.Y.data);
  const Out* const bias = static_cast<const Out*>(op.bias.data);
  const Out* const Z = static_cast<const Out*>(op.Z.data);
#pragma unroll
  for (int i = 0; i < size(Sums{}); i += 2) {
    const int64_t m = row + get<0>(places(i)), n = column + get<1>(places(i));
    if (m >= op.M || n >= op.N) continue;
    float first = sums(i), second = sums(i + 1);
    if (bias) {
      first += widen(bias[n]);
      second += widen(bias[n + 1]);
    }
    if (Z) {
      const Pair<Out> z = *reinterpret_cast<const Pair<Out>*>(Z + m * op.Z.row + n);
      first *= gelu_slope(widen(z.first), op.slope);
      second *= gelu_slope(widen(z.second), op.slope);
    }
    *reinterpret_cast<Pair<Out>*>(Y + m * op.Y.row + n) = {narrow<Out>(first), narrow<Out>(second)};
  }
}

template <class P, class Out>
__device__ void multiply_tiles(
    const LowRankGemm& op, const Tiles& tiles, typename P::Shared& shared, typename P::Pipeline& pipeline) {
  const Tensor a = make_tensor(make_smem_ptr(shared.a.data()), typename P::LayoutA{});
  const Tensor b = make_tensor(make_smem_ptr(shared.b.data()), typename P::LayoutB{});
  typename P::Mma mma;
  const auto mine = mma.get_thread_slice(static_cast<int>(threadIdx.x) - 128);
  const Tensor left = mine.make_fragment_A(mine.partition_A(a));
  const Tensor right = mine.make_fragment_B(mine.partition_B(b));
  const Tensor places = mine.partition_C(make_identity_tensor(Shape<typename P::M, typename P::N>{}));
  Tensor sums = partition_fragment_C(mma, Shape<typename P::M, typename P::N>{});

  cutlass::PipelineState<STAGES> read, release;
  for (int tile = static_cast<int>(blockIdx.x) / 2; tile < tiles.count(); tile += static_cast<int>(gridDim.x) / 2) {
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    for (int step = 0; step < tiles.steps; ++step, ++read) {
      pipeline.consumer_wait(read);
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < size<2>(left); ++k) {
        gemm(mma, left(_, _, k, read.index()), right(_, _, k, read.index()), sums);
        mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      warpgroup_wait<1>();  // of the step before: its buffers are free
      warpgroup_fence_operand(sums);
      if (step > 0) {
        pipeline.consumer_release(release);
        ++release;
      }
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
    pipeline.consumer_release(release);
    ++release;
    int m, n;
    tiles.place(tile, m, n);
    write_tile<Out>(
        op, static_cast<int64_t>(m) * typename P::M{}, static_cast<int64_t>(n) * typename P::N{}, sums, places);
  }
}

template <class P, class Out>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) lowrank_gemm_sm90_kernel(
    const __grid_constant__ Operands<P> from, const __grid_constant__ LowRankGemm op, const Tiles tiles) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  typename P::Shared& shared = *reinterpret_cast<typename P::Shared*>(bytes);
  const bool produces = threadIdx.x < 128;

  typename P::Pipeline::Params parameters;
  constexpr int elements = (cosize_v<typename P::LayoutA> + cosize_v<typename P::LayoutB>) / STAGES;
  parameters.transaction_bytes = elements * sizeof(typename P::T);
  parameters.role = produces ? P::Pipeline::ThreadCategory::Producer : P::Pipeline::ThreadCategory::Consumer;
  parameters.is_leader = threadIdx.x == 0;
  parameters.num_consumers = CONSUMERS;
  typename P::Pipeline pipeline(shared.pipeline, parameters, Cluster{});
  cluster_arrive_relaxed();
  cluster_wait();  // the barriers of both blocks are there

  if (produces) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x < 32 && elect_one_sync()) produce_tiles<P>(from, op, tiles, shared, pipeline);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    multiply_tiles<P, Out>(op, tiles, shared, pipeline);
  }
}

template <class P, class Out>
cudaError_t launch_product(const LowRankGemm& op, cudaStream_t stream) {
  const int M = static_cast<int>(op.M), N = static_cast<int>(op.N), K = static_cast<int>(op.K),
            R = static_cast<int>(op.R);
  const Operands<P> from{P::copy_a(op.A, M, K), P::copy_a(op.H, M, R), P::copy_b(op.B, N, K), P::copy_b(op.T, N, R)};
  const Tiles tiles = Tiles::of<P>(op);
  const int pairs = std::min(tiles.count(), multiprocessors() / 2);
  return launch<sizeof(typename P::Shared), SHARED_OF_SM90>(
      lowrank_gemm_sm90_kernel<P, Out>, dim3(static_cast<unsigned>(2 * pairs)), THREADS, stream, from, op, tiles);
}

template <class T, class Out>
cudaError_t launch_order(const LowRankGemm& op, cudaStream_t stream) {
  return op.transposed ? launch_product<Product<T, true>, Out>(op, stream)
                       : launch_product<Product<T, false>, Out>(op, stream);
}

}  // namespace

bool lowrank_gemm_sm90_takes(const LowRankGemm& op) {
  constexpr int64_t most = int64_t{1} << 31;
  const bool one_type =
      op.Y.type == op.A.type && (!op.Z.data || op.Z.type == op.A.type) && (!op.bias.data || op.bias.type == op.A.type);
  const bool sizes =
      op.samples == 1 && op.N % 2 == 0 && op.R > 0 && op.K > 0 && op.M < most && op.N < most && op.K < most;
  // TMA's rows must not overlap, and pairs of neighbours of Z must be aligned.
  const bool rows = op.A.row >= op.K && op.H.row >= op.R && op.B.row >= (op.transposed ? op.K : op.N) &&
                    op.T.row >= (op.transposed ? op.R : op.N) && op.Z.row % 2 == 0;
  const bool fills = ceil_div(op.M, 128) * ceil_div(op.N, 256) >= multiprocessors() / 2;
  return op.A.type != Type::float32 && one_type && sizes && rows && fills;
}

cudaError_t lowrank_gemm_sm90(const LowRankGemm& op, cudaStream_t stream) {
  return op.A.type == Type::bfloat16 ? launch_order<cutlass::bfloat16_t, bf16>(op, stream)
                                     : launch_order<cutlass::half_t, fp16>(op, stream);
}

}  // namespace efft
