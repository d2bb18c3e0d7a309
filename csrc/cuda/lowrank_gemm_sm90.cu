// Computes Y = A B + bias + H T, where H = A P (see LowRankGemm in kernels.h), with bulk tensor copies (TMA) and
// warp-group products (WGMMA). The kernel is persistent: each block computes one tile of Y after another. It is also
// warp-specialized: one thread copies the operands of each step along K into a ring of buffers, and two or three warp
// groups, which own 64 rows of the tile each, multiply them. H T is called the tail of the product. The kernel has two
// generations; the second is used if EFFT_SM90_GENERATION=2 selects it. The third generation is a separate kernel, in
// lowrank_gemm_pingpong_sm90.cu.
//
// H is computed in one of two ways. Up to a rank of 32, this kernel can compute H itself, as additional columns of the
// product next to every tile of Y. The sums of H are then rounded in the registers and become the left operand of the
// tail, and the blocks that compute the first column of tiles also store H. Otherwise another kernel has already
// computed H, and the steps of the tail follow those of A B: they copy H and T into the same buffers. TMA fills
// elements beyond the rank, and beyond every other edge, with zeros.
//
// Two blocks form a pair, which is a cluster. The two tiles of a pair are next to each other: they have adjacent rows
// and the same columns of Y, and therefore the same operands B, T and P. Each block copies half of each of these
// operands, for both blocks. There is one exception: if the second generation computes H, the two tiles have the same
// rows and adjacent columns of Y. Then each block copies half of the tile of A for both blocks, computes half of the
// columns of H, and sends this half to the other block.
#include <algorithm>

#include "launch.h"
#include "lowrank_gemm_sm90.h"
#include "pipeline_sm90.cuh"  // before headers that use only CUDA, because CuTe must come first
#include "tiles.cuh"

namespace efft {

namespace {

// Writes two adjacent elements in one store.
template <class Out>
__device__ void write_pair(Out* to, float first, float second) {
  *reinterpret_cast<Pair<Out>*>(to) = {narrow<Out>(first), narrow<Out>(second)};
}

// Adds the bias to the sums of 16 rows and P::N columns that a warp holds, rounds them, and writes them to Y, 16 bytes
// at a time. Of every 8 columns, a thread holds 2 adjacent ones in rows r and r + 8. `rows` is shared memory in which
// the warp rearranges the elements.
template <class P, class Out, class Sums>
__device__ void write_rows(const LowRankGemm& op, int64_t row, int64_t column, const Sums& sums, Out* rows) {
  const int lane = static_cast<int>(threadIdx.x) % 32, r = lane / 4, c = lane % 4;
  Out* const Y = static_cast<Out*>(op.Y.data);
  const Out* const bias = static_cast<const Out*>(op.bias.data);
#pragma unroll
  for (int first = 0; first < typename P::N{}; first += P::OUT_COLUMNS) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < P::OUT_COLUMNS / 8; ++j) {
      const int i = (first / 8 + j) * 4;
      const int64_t n = column + first + 8 * j + 2 * c;
      float add = 0, add_next = 0;
      if (bias && n < op.N) {
        add = widen(bias[n]);
        add_next = widen(bias[n + 1]);
      }
      Out* const to = rows + r * P::OUT_ROW + 8 * j + 2 * c;
      if constexpr (P::SECOND) {
        write_pair<Out>(to, sums(i) + add, sums(i + 1) + add_next);
        write_pair<Out>(to + 8 * P::OUT_ROW, sums(i + 2) + add, sums(i + 3) + add_next);
      } else {
        to[0] = narrow<Out>(sums(i) + add);
        to[1] = narrow<Out>(sums(i + 1) + add_next);
        to[8 * P::OUT_ROW] = narrow<Out>(sums(i + 2) + add);
        to[8 * P::OUT_ROW + 1] = narrow<Out>(sums(i + 3) + add_next);
      }
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 16; half += 8) {
      const int64_t m = row + half + r, n = column + first + 8 * c;
      if (m < op.M && n < op.N)
        *reinterpret_cast<uint4*>(Y + m * op.Y.row + n) =
            *reinterpret_cast<const uint4*>(rows + (half + r) * P::OUT_ROW + 8 * c);
    }
  }
}

// Multiplies the copied operands and writes this block's tiles of Y, and H if the kernel computes it. All threads of
// the multiplying warp groups call this function.
template <class P, class Out>
__device__ void multiply_tiles(const LowRankGemm& op, const Tiles& tiles, typename P::Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x) - 128, warp = thread / 32, lane = thread % 32;
  const Tensor a = make_tensor(make_smem_ptr(shared.a.data()), typename P::LayoutA{});
  const Tensor b = make_tensor(make_smem_ptr(shared.b.data()), typename P::LayoutB{});
  const Tensor p = make_tensor(make_smem_ptr(shared.p.data()), typename P::LayoutP{});
  typename P::Mma mma;
  typename P::MmaH mma_h;
  typename P::MmaTail mma_tail;
  const auto mine = mma.get_thread_slice(thread);
  const auto mine_h = mma_h.get_thread_slice(thread);
  const auto mine_tail = mma_tail.get_thread_slice(thread);
  const Tensor left = mine.make_fragment_A(mine.partition_A(a));
  const Tensor right = mine.make_fragment_B(mine.partition_B(b));
  const Tensor right_h = mine_h.make_fragment_B(mine_h.partition_B(p));
  const Tensor right_tail = mine_tail.make_fragment_B(mine_tail.partition_B(b));
  Tensor y = partition_fragment_C(mma, Shape<typename P::M, typename P::N>{});
  Tensor h = partition_fragment_C(mma_h, Shape<typename P::M, typename P::R>{});
  // The sums of 16 columns of H have the same layout in registers as the left operand of a product over these columns.
  Tensor h_left = make_tensor<typename P::T>(
      make_layout(make_shape(Shape<_2, _2, _2>{}, _1{}, Int<(P::RANKS == 0 ? 32 : P::RANKS) / 16>{})));

  RingPlace place;
  uint32_t half_round = 0;
  const auto release = [&](int stage) {
    if (thread % 128 < PAIR) shared.empty[stage].arrive(static_cast<uint32_t>(thread % 128));
  };
  for (int tile = static_cast<int>(blockIdx.x) / PAIR; tile < tiles.count();
      tile += static_cast<int>(gridDim.x) / PAIR) {
    int m, n;
    tiles.template place<P>(tile, m, n);
    const int64_t row = static_cast<int64_t>(m) * typename P::M{} + warp * 16,
                  column = static_cast<int64_t>(n) * typename P::N{};
    mma.accumulate_ = mma_h.accumulate_ = GMMA::ScaleOut::Zero;
    int last = -1;
    // Computes one step whose depth is `depth` times 16.
    const auto multiply_step = [&](auto depth) {
      shared.full[place.stage].wait(place.round);
      warpgroup_fence_operand(y);
      if constexpr (P::RANKS > 0) warpgroup_fence_operand(h);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < decltype(depth)::value; ++k) {
        gemm(mma, left(_, _, k, place.stage), right(_, _, k, place.stage), y);
        mma.accumulate_ = GMMA::ScaleOut::One;
        if constexpr (P::RANKS > 0) {
          gemm(mma_h, left(_, _, k, place.stage), right_h(_, _, k, place.stage), h);
          mma_h.accumulate_ = GMMA::ScaleOut::One;
        }
      }
      warpgroup_commit_batch();
      warpgroup_wait<1>();  // waits for the products of the previous step, whose buffer is then free
      warpgroup_fence_operand(y);
      if constexpr (P::RANKS > 0) warpgroup_fence_operand(h);
      if (last >= 0) release(last);
      last = place.stage;
      place.next();
    };
    // If H has already been computed, the last step of the tail has the full depth in the first generation. In the
    // second generation, it is only as deep as the rank needs, rounded up to a multiple of 16.
    const bool is_short = P::SECOND && P::RANKS == 0 && tiles.last_depth < 4;
    const int whole_steps = P::RANKS > 0 ? tiles.main_steps : is_short ? tiles.steps - 1 : tiles.steps;
    for (int step = 0; step < whole_steps; ++step) multiply_step(_4{});
    if constexpr (P::SECOND && P::RANKS == 0) {
      if (tiles.last_depth == 1) multiply_step(_1{});
      if (tiles.last_depth == 2) multiply_step(_2{});
      if (tiles.last_depth == 3) multiply_step(_3{});
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(y);
    if constexpr (P::RANKS > 0) {
      warpgroup_fence_operand(h);
      release(last);
      Tensor pairs = recast<uint32_t>(h_left);
      // Columns of H beyond the rank are set to zero. They are sums of products with zeros, which are NaN if A contains
      // an infinity.
      const auto rounded = [&](int i, int64_t first) {
        return static_cast<typename P::T>(first + 8 * (i / 4) + 2 * (lane % 4) + i % 2 < op.R ? h(i) : 0.0f);
      };
      if constexpr (P::SHARES_H) {
        const uint32_t rank = block_rank_in_cluster();
        array_aligned<typename P::T, 2 * P::HALF> values;
#pragma unroll
        for (int i = 0; i < size(h); ++i) values[i] = rounded(i, rank * typename P::R{});
        uint32_t mine[P::HALF];
        const uint32_t* const both_columns = reinterpret_cast<const uint32_t*>(values.data());
#pragma unroll
        for (int i = 0; i < P::HALF; ++i) mine[i] = both_columns[i];
        if (lane == 0) shared.has_half[warp].arrive_and_expect_tx(32 * sizeof(mine));
        send_async(1 - rank, mine, shared.other_half[thread], &shared.has_half[warp]);
        shared.has_half[warp].wait(half_round);
        half_round ^= 1;
#pragma unroll
        for (int i = 0; i < P::HALF; ++i) {
          const uint32_t other = shared.other_half[thread][i];
          pairs(i) = rank == 0 ? mine[i] : other;
          pairs(P::HALF + i) = rank == 0 ? other : mine[i];
        }
      } else {
#pragma unroll
        for (int i = 0; i < size(h); ++i) h_left(i) = rounded(i, 0);
      }
      if (n == 0) {
#pragma unroll
        for (int i = 0; i < size(pairs); ++i) {
          const int64_t to = row + lane / 4 + 8 * (i % 2);
          const int r = 8 * (i / 2) + 2 * (lane % 4);
          if (to < op.M && r < op.H.row)
            *reinterpret_cast<uint32_t*>(static_cast<Out*>(op.H.data) + to * op.H.row + r) = pairs(i);
        }
      }
      shared.full[place.stage].wait(place.round);
      warpgroup_fence_operand(y);
      warpgroup_fence_operand(h_left);
      warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < size<2>(h_left); ++k) gemm(mma_tail, h_left(_, _, k), right_tail(_, _, k, place.stage), y);
      warpgroup_commit_batch();
      warpgroup_wait<0>();
      warpgroup_fence_operand(y);
      last = place.stage;
      place.next();
    }
    release(last);
    write_rows<P, Out>(op, row, column, y, reinterpret_cast<Out*>(shared.out[warp]));
  }
}

template <class P, class Out>
__global__ void __launch_bounds__(P::THREADS, 1) lowrank_gemm_sm90_kernel(
    const __grid_constant__ Operands<P> from, const __grid_constant__ LowRankGemm op, const Tiles tiles) {
  if constexpr (P::SECOND) start_next_kernel();
  typename P::Shared& shared = *reinterpret_cast<typename P::Shared*>(shared_memory());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      shared.full[stage].init(1);
      shared.empty[stage].init(PAIR * P::GROUPS);
    }
    if constexpr (P::SHARES_H)
      for (auto& barrier : shared.has_half) barrier.init(1);
    cutlass::arch::fence_barrier_init();
  }
  cluster_arrive_relaxed();
  cluster_wait();  // the barriers of both blocks are initialized
  __syncthreads();
  if constexpr (P::SECOND) {
    if (threadIdx.x == 0) prefetch_maps<P>(from);
    __syncwarp();
    wait_for_kernel_in_front();
  }

  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<P::GROUPS == 3 ? 32 : 40>();
    if (threadIdx.x == 0) copy_tiles<P>(from, op, tiles, static_cast<int>(gridDim.x) / PAIR, shared);
    __syncwarp();  // waits for lane 0, because all lanes of a warp must reach the barrier of the cluster below together
  } else {
    cutlass::arch::warpgroup_reg_alloc<P::GROUPS == 3 ? 160 : 232>();
    multiply_tiles<P, Out>(op, tiles, shared);
  }
  // This block must not end yet, because the other block of the pair may still arrive at this block's barriers.
  cluster_arrive();
  cluster_wait();
}

template <class P, class Out>
cudaError_t launch_product(const LowRankGemm& op, cudaStream_t stream) {
  const Operands<P> from = operands_of<P>(op);
  if (!are_encoded(from)) return cudaErrorInvalidValue;
  const Tiles tiles = Tiles::of<P>(op);
  const int pairs = std::min(tiles.count(), multiprocessors() / PAIR);
  const LaunchShape shape{dim3(static_cast<unsigned>(PAIR * pairs)), P::THREADS, PAIR, P::SECOND};
  return launch<lowrank_gemm_sm90_kernel<P, Out>, sizeof(typename P::Shared), SHARED_OF_SM90>(
      shape, stream, from, op, tiles);
}

// Returns an estimate of the time of a product with tiles [rows, columns]: the number of waves, in each of which every
// pair of blocks computes one pair of tiles, times the number of elements of a tile. If `shares_h` is set, the two
// tiles of a pair have the same rows, else the same columns.
int64_t wave_cost(const LowRankGemm& op, int64_t rows, int64_t columns, bool shares_h) {
  const int64_t pairs = ceil_div(op.M, (shares_h ? 1 : PAIR) * rows) * ceil_div(op.N, (shares_h ? PAIR : 1) * columns);
  return ceil_div(pairs, multiprocessors() / PAIR) * rows * columns;
}

template <class T, class Out, bool TRANSPOSED, int RANKS, bool SECOND>
cudaError_t launch_tile(const LowRankGemm& op, cudaStream_t stream) {
  using Square = Product<T, TRANSPOSED, 3, 192, RANKS, SECOND>;
  using Wide = Product<T, TRANSPOSED, 2, 256, RANKS, SECOND>;
  const bool is_square = wave_cost(op, 192, 192, Square::SHARES_H) < wave_cost(op, 128, 256, Wide::SHARES_H);
  return is_square ? launch_product<Square, Out>(op, stream) : launch_product<Wide, Out>(op, stream);
}

template <class T, class Out, int RANKS, bool SECOND>
cudaError_t launch_order(const LowRankGemm& op, cudaStream_t stream) {
  return op.transposed ? launch_tile<T, Out, true, RANKS, SECOND>(op, stream)
                       : launch_tile<T, Out, false, RANKS, SECOND>(op, stream);
}

template <class T, class Out>
cudaError_t launch_type(const LowRankGemm& op, cudaStream_t stream) {
  if (generation() == 1)
    return op.P.data ? launch_order<T, Out, MADE_RANKS, false>(op, stream) : launch_order<T, Out, 0, false>(op, stream);
  if (!op.P.data) return launch_order<T, Out, 0, true>(op, stream);
  // Each block computes half of the columns of H: 16 columns, or 8 if the rank is at most 16. In the latter case, a
  // tile with 256 columns of Y has 256 + 8 columns to compute instead of 256 + 16, which is 2.9 % less.
  return op.R <= MADE_RANKS / 2 ? launch_order<T, Out, MADE_RANKS / 2, true>(op, stream)
                                : launch_order<T, Out, MADE_RANKS, true>(op, stream);
}

}  // namespace

bool lowrank_gemm_sm90_makes_h(const LowRankGemm& op) {
  // From the second generation on, a block has memory for only one half of H from the other block. The other block
  // sends its half for the next tile after the product A B of that tile. If this product has at least as many steps as
  // the ring has buffers, the other block can finish it only after this block has released all buffers of the current
  // tile. This block has then also read the half of H for the current tile.
  const bool pays = generation() >= 2 ? op.K > (STAGES - 1) * 64 : op.N <= MADE_BESIDE;
  return op.R <= MADE_RANKS && pays;
}

bool lowrank_gemm_sm90_computes_gelu(const LowRankGemm& op) {
  const auto fits = [&](const Matrix& m) {
    return !m.data || (m.type == op.A.type && m.row % 8 == 0 && m.row >= op.N);
  };
  return generation() >= 3 && fits(op.gelu.z) && fits(op.gelu.a);
}

bool lowrank_gemm_sm90_takes(const LowRankGemm& op) {
  constexpr int64_t most = int64_t{1} << 31;
  const bool one_type = op.Y.type == op.A.type && (!op.bias.data || op.bias.type == op.A.type);
  const bool sizes = op.samples == 1 && op.N % 8 == 0 && op.R > 0 && op.K > 0 && op.M < most && op.N < most &&
                     op.K < most && op.Y.row % 8 == 0;
  // TMA requires that the rows of a matrix do not overlap.
  const bool rows = op.A.row >= op.K && op.H.row >= op.R && op.B.row >= (op.transposed ? op.K : op.N) &&
                    op.T.row >= (op.transposed ? op.R : op.N);
  const bool fills = multiprocessors() >= PAIR && ceil_div(op.M, 128) * ceil_div(op.N, 256) >= multiprocessors() / PAIR;
  return op.A.type != Type::float32 && one_type && sizes && rows && fills;
}

cudaError_t lowrank_gemm_sm90(const LowRankGemm& op, cudaStream_t stream) {
  if (generation() >= 3) return lowrank_gemm_pingpong_sm90(op, stream);
  return op.A.type == Type::bfloat16 ? launch_type<cutlass::bfloat16_t, bf16>(op, stream)
                                     : launch_type<cutlass::half_t, fp16>(op, stream);
}

}  // namespace efft
