// Computes the product of lowrank_gemm_sm90.cu in the third generation, with ping-pong tiles: Y = A B + bias + H T.
//
// In lowrank_gemm_sm90.cu, the warp groups of a block compute each tile together, and the tensor cores are idle while
// the groups write the tile. Here each of two warp groups computes tiles of its own, one after the other group's. While
// one group finishes a tile, the other group multiplies:
// - Group 0 computes the first, third, ... tile of the block, and group 1 computes the others. One thread copies the
//   operands of all tiles in this order into the ring of buffers.
// - A group starts the main loop of a tile when the other group has issued the main loop of the tile before, and when
//   all operands of that tile have arrived. The other group then exchanges its half of H with the other block of the
//   pair and adds the tail. Group g of a block exchanges with group g of the other block, because both blocks compute
//   the same list of pairs of tiles.
// - A group rounds its tile, writes it to a part of shared memory (the staging tile), and starts a bulk copy from
//   there to Y, which leaves out elements beyond the edges of Y. The groups use the one staging tile in turn: a group
//   writes it after the copy of the other group's tile has read it.
//
// The product can also apply a GELU to its result (GeluOfProduct in kernels.h). A group then reads its rounded tile
// again from the staging tile, and each thread computes 8 adjacent elements at a time. Their values leave directly from
// its registers, in stores of 16 bytes that together fill lines of 128 bytes. The sums of the tile need no registers
// any more. Therefore the GELU needs no additional registers and no second staging tile, and its loop is short. The
// arithmetic of one group runs while the other group's main loop uses the tensor cores.
#include <algorithm>

#include "gelu.cuh"
#include "launch.h"
#include "lowrank_gemm_sm90.h"
#include "pipeline_sm90.cuh"  // before headers that use only CUDA, because CuTe must come first
#include "tiles.cuh"

namespace efft {

namespace {

// Barriers of the block. At TURN + g, group g waits for its turn in the main loop; at FREE + g it waits until it may
// write the staging tile; at STAGED + g its threads wait until all of them have written or read it.
constexpr int TURN = 1, FREE = 3, STAGED = 5;
constexpr int GROUP_THREADS = 128, WARP_THREADS = 32;

// The product that a warp group computes. Each group has two products of 64 rows per step.
template <class T_, bool TRANSPOSED, int COLUMNS, int RANKS_>
struct PingPong : TileProduct<T_, TRANSPOSED, 1, 128, COLUMNS, RANKS_, true> {
  using Base = TileProduct<T_, TRANSPOSED, 1, 128, COLUMNS, RANKS_, true>;
  using Base::RANKS, Base::SHARES_H, Base::HALF;
  using typename Base::LayoutA, typename Base::LayoutB, typename Base::LayoutP;
  using typename Base::T, typename Base::M, typename Base::N;
  static constexpr int CONSUMERS = 2, PARTS = 2;  // the number of groups, and of products of 64 rows in a tile
  static constexpr int THREADS = GROUP_THREADS * (1 + CONSUMERS);
  // The staging tile consists of boxes of 64 columns, whose rows have 128 bytes.
  using LayoutY = decltype(tile_to_shape(typename Base::AtomK{}, Shape<M, N>{}));
  static constexpr int BOX_COLUMNS = 64, ROW_BYTES = 128;

  struct alignas(1024) Shared {
    array_aligned<T, cosize_v<LayoutA>, 1024> a;
    array_aligned<T, cosize_v<LayoutB>, 1024> b;
    array_aligned<T, RANKS == 0 ? 8 : cosize_v<LayoutP>, 1024> p;
    array_aligned<T, cosize_v<LayoutY>, 1024> y;
    // The half of H that the other block computes, and one barrier per warp, which signals that the warp's part of this
    // half has arrived.
    alignas(16) uint32_t other_half[SHARES_H ? GROUP_THREADS * CONSUMERS : 1][PARTS][SHARES_H ? HALF : 1];
    cutlass::arch::ClusterTransactionBarrier has_half[4 * CONSUMERS];
    cutlass::arch::ClusterTransactionBarrier full[STAGES];
    cutlass::arch::ClusterBarrier empty[STAGES];
  };
  static_assert(sizeof(Shared) <= SHARED_OF_SM90);

  static auto copy_y(const Matrix& of, int rows, int columns) {
    const Tensor y = make_tensor(
        make_gmem_ptr(static_cast<T*>(of.data)), make_layout(make_shape(rows, columns), make_stride(of.row, _1{})));
    return make_tma_copy(SM90_TMA_STORE{}, y, LayoutY{}, Shape<M, N>{}, _1{});
  }
  using CopyY = decltype(copy_y({}, 0, 0));
};

// The position of a thread among those that multiply.
struct Consumer {
  int group, thread, warp, lane;  // the thread and the warp are counted within the group

  __device__ static Consumer me() {
    const uint32_t number = read_thread_index() - GROUP_THREADS, thread = number % GROUP_THREADS;
    return {static_cast<int>(number / GROUP_THREADS), static_cast<int>(thread), static_cast<int>(thread / WARP_THREADS),
        static_cast<int>(thread % WARP_THREADS)};
  }
  __device__ int other() const { return 1 - group; }
  __device__ int slot() const { return group * GROUP_THREADS + thread; }  // its number in the block
  // Returns the row of the tile in which the rows of this warp begin, in the given part of the tile.
  __device__ int first_row(int part) const { return 64 * part + 16 * warp; }
};

template <class Out>
__device__ uint32_t round_pair(float first, float second) {
  const Pair<Out> rounded{narrow<Out>(first), narrow<Out>(second)};
  uint32_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

template <class Out>
__device__ Pair<float> unpack_pair(uint32_t bits) {
  Pair<Out> pair;
  memcpy(&pair, &bits, sizeof pair);
  return {widen(pair.first), widen(pair.second)};
}

// Adds the bias to the sums of a tile, rounds them, and writes them to the staging tile, in which 16-byte chunks of a
// row are exchanged as the tensor map of Y expects. Of every 8 columns, a thread holds 2 adjacent ones in rows r and
// r + 8.
template <class P, class Out, class Sums>
__device__ void stage_tile(
    const LowRankGemm& op, const Consumer& me, uint32_t column, const Sums& sums, typename P::Shared& shared) {
  constexpr int BOX_BYTES = typename P::M{} * P::ROW_BYTES;
  // The lanes 0 to 15 pass addresses of rows for the first 8 of every 16 columns, the others for the last 8.
  const int row = me.first_row(0) + me.lane % 16, chunk = me.lane / 16;
  const int place = row * P::ROW_BYTES + (chunk ^ row % 8) * 16;
  unsigned char* const staging = reinterpret_cast<unsigned char*>(shared.y.data());
  // This thread's first column, and the number of columns of the bias from there on.
  const size_t first_column = column + static_cast<uint32_t>(me.lane % 4 * 2);
  const int columns = op.bias.data ? static_cast<int>(op.N - static_cast<int64_t>(first_column)) : 0;
  const Out* const bias = static_cast<const Out*>(op.bias.data);
#pragma unroll
  for (int first = 0; first < typename P::N{}; first += 16) {
    float add[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i / 2 * 8 < columns)  // N is a multiple of 8
        add[i] = widen(bias[first_column + static_cast<size_t>(first + i / 2 * 8 + i % 2)]);
    const int box = first / P::BOX_COLUMNS, pair_of_chunks = first % P::BOX_COLUMNS / 16;
#pragma unroll
    for (int part = 0; part < P::PARTS; ++part) {
      const int i = part * typename P::N{} / 2 + first / 2;
      const uint32_t rounded[4] = {
          round_pair<Out>(sums(i) + add[0], sums(i + 1) + add[1]),
          round_pair<Out>(sums(i + 2) + add[0], sums(i + 3) + add[1]),
          round_pair<Out>(sums(i + 4) + add[2], sums(i + 5) + add[3]),
          round_pair<Out>(sums(i + 6) + add[2], sums(i + 7) + add[3]),
      };
      store_matrices(staging + box * BOX_BYTES + part * 64 * P::ROW_BYTES + (place ^ pair_of_chunks * 32), rounded);
    }
  }
}

// Starts to copy the staging tile to tile (m, n) of Y. One thread calls this.
template <class P>
__device__ void store_tile(
    const typename P::CopyY& to, const LowRankGemm& op, int m, int n, typename P::Shared& shared) {
  const Tensor y = make_tensor(make_smem_ptr(shared.y.data()), typename P::LayoutY{});
  const Tensor all = to.get_tma_tensor(make_shape(static_cast<int>(op.M), static_cast<int>(op.N)));
  const Tensor tile = local_tile(all, Shape<typename P::M, typename P::N>{}, make_coord(m, n));
  const auto part = to.get_slice(0);
  copy(to, part.partition_S(y), part.partition_D(tile));
  commit_stores();
}

// Eight adjacent elements, as pairs. A thread reads or writes them at a time.
struct alignas(16) Chunk {
  uint32_t pairs[4];
};

// The chunks of a tile of a matrix that a thread reads or writes. They are ROWS rows apart, in one box after the other.
template <class P>
struct Chunks {
  static constexpr int ROWS = GROUP_THREADS / 8, STEPS_OF_BOX = typename P::M{} / ROWS;
  static constexpr int STEPS = STEPS_OF_BOX * typename P::N{} / P::BOX_COLUMNS;

  Chunk* at;     // the next chunk
  int64_t down;  // distance to the chunk ROWS rows below

  template <class Out>
  __device__ static Chunks from(const Matrix& of, int64_t row, int64_t column) {
    const int64_t stride = recompute_from(of.row);
    return {reinterpret_cast<Chunk*>(static_cast<Out*>(of.data) + row * stride + column), stride / 8 * ROWS};
  }
  // Moves past `count` chunks of one box, of which `step` is the number of the first.
  __device__ void skip(int step, int count) {
    at += count * down;
    if ((step + count) % STEPS_OF_BOX == 0) at += P::BOX_COLUMNS / 8 - STEPS_OF_BOX * down;
  }
};

// Applies the GELU to the staging tile, which contains tile (m, n) of the result. Without BACKWARD, the tile contains
// the input z of the GELU, and the GELU is written to op.gelu.a. With BACKWARD, the tile contains the gradient of the
// GELU's output. Then the gradient of z is written to Y, and the GELU of op.gelu.z to op.gelu.a, if that is given.
template <class P, class Out, bool BACKWARD, bool BY_TANH>
__device__ void apply_gelu(const LowRankGemm& op, int m, int n, const typename P::Shared& shared) {
  using Places = Chunks<P>;
  // With BACKWARD, a thread reads AHEAD chunks of z before it computes with the AHEAD chunks that it has read before.
  constexpr int AHEAD = BACKWARD ? 4 : 1;
  static_assert(Places::STEPS_OF_BOX % AHEAD == 0);
  const Consumer me = Consumer::me();
  const int first_row = me.thread / 8, chunk = me.thread % 8;  // 8 threads read the 128 bytes of a row
  const unsigned char* const staging =
      reinterpret_cast<const unsigned char*>(shared.y.data()) + first_row * P::ROW_BYTES + (chunk ^ first_row % 8) * 16;
  const int64_t row = static_cast<int64_t>(m) * typename P::M{} + first_row,
                column = static_cast<int64_t>(n) * typename P::N{} + chunk * 8;
  // The numbers of rows and columns of the matrices from there on, up to the size of a tile. N is a multiple of 8.
  const int rows = static_cast<int>(min(op.M - row, int64_t{typename P::M{}})),
            columns = static_cast<int>(min(op.N - column, int64_t{typename P::N{}}));
  const auto exists = [&](int step, int i) {
    return (step % Places::STEPS_OF_BOX + i) * Places::ROWS < rows &&
           step / Places::STEPS_OF_BOX * P::BOX_COLUMNS < columns;
  };
  const bool writes_a = !BACKWARD || op.gelu.a.data;
  Places to_y = Places::template from<Out>(op.Y, row, column),
         to_a = Places::template from<Out>(writes_a ? op.gelu.a : op.Y, row, column),
         from_z = BACKWARD ? Places::template from<Out>(op.gelu.z, row, column) : to_y;
  Chunk next[AHEAD];
  const auto read_z = [&](int step) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) next[i] = exists(step, i) ? from_z.at[i * from_z.down] : Chunk{};
    from_z.skip(step, AHEAD);
  };
  if constexpr (BACKWARD) read_z(0);
#pragma unroll 1
  for (int step = 0; step < Places::STEPS; step += AHEAD) {
    Chunk z[AHEAD];
    if constexpr (BACKWARD) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) z[i] = next[i];
      if (step + AHEAD < Places::STEPS) read_z(step + AHEAD);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      Chunk tile = *reinterpret_cast<const Chunk*>(staging + (step + i) * Places::ROWS * P::ROW_BYTES), a;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const auto [first, second] = unpack_pair<Out>(BACKWARD ? z[i].pairs[j] : tile.pairs[j]);
        const Gelu one = BY_TANH ? gelu_by_tanh<Out>(first) : gelu_by_erf<Out>(first),
                   other = BY_TANH ? gelu_by_tanh<Out>(second) : gelu_by_erf<Out>(second);
        a.pairs[j] = round_pair<Out>(one.value, other.value);
        const auto [gradient, next_gradient] = unpack_pair<Out>(tile.pairs[j]);
        if constexpr (BACKWARD) tile.pairs[j] = round_pair<Out>(gradient * one.slope, next_gradient * other.slope);
      }
      if (!exists(step, i)) continue;
      if (writes_a) to_a.at[i * to_a.down] = a;
      if constexpr (BACKWARD) to_y.at[i * to_y.down] = tile;
    }
    to_a.skip(step, AHEAD);
    to_y.skip(step, AHEAD);
  }
}

// Applies op.gelu to the staging tile.
template <class P, class Out>
__device__ void apply_gelu(const LowRankGemm& op, int m, int n, const typename P::Shared& shared) {
  const bool by_tanh = op.gelu.which == Producer::gelu_tanh;
  if (op.gelu.z.data)
    by_tanh ? apply_gelu<P, Out, true, true>(op, m, n, shared) : apply_gelu<P, Out, true, false>(op, m, n, shared);
  else
    by_tanh ? apply_gelu<P, Out, false, true>(op, m, n, shared) : apply_gelu<P, Out, false, false>(op, m, n, shared);
}

// The turns in which the tiles are computed. Each pair of blocks computes every stride-th pair of tiles.
struct Turns {
  Tiles tiles;
  int stride, count;  // `count` is the number of pairs of tiles

  // Returns the same turns. The compiler does not keep values that depend on the result in registers before this call.
  __device__ Turns recomputed() const {
    Turns same = *this;
    same.tiles.rows = recompute_from(tiles.rows);
    same.tiles.columns = recompute_from(tiles.columns);
    same.stride = recompute_from(stride);
    same.count = recompute_from(count);
    return same;
  }
  __device__ static int first() { return static_cast<int>(blockIdx.x / PAIR); }
  __device__ static bool is_first(int tile) { return tile == first(); }
  __device__ bool is_last(int tile) const { return tile + stride >= count; }
  // Returns how many tiles this group computes before the tile.
  __device__ int number(int tile) const { return (tile - first()) / stride / 2; }
};

// Rounds this thread's sums of one half of H to `own`, sends them to the other block of the pair, and waits until the
// other half has arrived in shared.other_half. In the first column of pairs of tiles, each block also stores its half
// of H.
template <class P, class Out, class Sums>
__device__ void exchange_h(const LowRankGemm& op, const Turns& turns, int tile, const Sums& h,
    uint32_t (&own)[P::PARTS][P::HALF], typename P::Shared& shared) {
  const Consumer me = Consumer::me();
  const uint32_t rank = block_rank_in_cluster();
  const int first_column = static_cast<int>(rank) * typename P::R{} + 2 * (me.lane % 4);
#pragma unroll
  for (int part = 0; part < P::PARTS; ++part)
#pragma unroll
    for (int i = 0; i < P::HALF; ++i) {
      // Columns beyond the rank are set to zero, because an infinity in A makes them NaN.
      const int r = first_column + 8 * (i / 2), sum = 2 * (part * P::HALF + i);
      own[part][i] = round_pair<Out>(r < op.R ? h(sum) : 0.0f, r + 1 < op.R ? h(sum + 1) : 0.0f);
    }
  auto& has_half = shared.has_half[me.slot() / WARP_THREADS];
  if (me.lane == 0) has_half.arrive_and_expect_tx(WARP_THREADS * sizeof(own));
#pragma unroll
  for (int part = 0; part < P::PARTS; ++part)
    send_async(1 - rank, own[part], shared.other_half[me.slot()][part], &has_half);
  int m, n;
  turns.recomputed().tiles.template place<P>(tile, m, n);
  if (n < PAIR) {
    Out* const H = static_cast<Out*>(op.H.data);
#pragma unroll
    for (int part = 0; part < P::PARTS; ++part)
#pragma unroll
      for (int i = 0; i < P::HALF; ++i) {
        const int64_t row = static_cast<int64_t>(m) * typename P::M{} + me.first_row(part) + me.lane / 4 + 8 * (i % 2);
        const int r = first_column + 8 * (i / 2);
        if (row < op.M && r < op.H.row) *reinterpret_cast<uint32_t*>(H + row * op.H.row + r) = own[part][i];
      }
  }
  has_half.wait(static_cast<uint32_t>(turns.recomputed().number(tile) % 2));
}

// Puts the two halves of 64 rows of H into the registers of the left operand of the tail.
template <class P, class Registers>
__device__ void join_halves(const uint32_t (&own)[P::HALF], const uint32_t (&other)[P::HALF], Registers&& pairs) {
  const bool is_left = block_rank_in_cluster() == 0;
#pragma unroll
  for (int i = 0; i < P::HALF; ++i) {
    const uint32_t received = other[i];
    pairs(i) = is_left ? own[i] : received;
    pairs(P::HALF + i) = is_left ? received : own[i];
  }
}

// Copies the staging tile, which the group has written, to Y, and applies the GELU if the product has one. Then the
// other group may write the staging tile.
template <class P, class Out>
__device__ void finish_tile(
    const typename P::CopyY& to, const LowRankGemm& op, const Turns& turns, int tile, typename P::Shared& shared) {
  const Consumer me = Consumer::me();
  const bool has_gelu = op.gelu.which != Producer::none;
  if (me.warp != 0 && !has_gelu) return;
  int m, n;
  turns.recomputed().tiles.template place<P>(tile, m, n);
  if (me.warp == 0 && me.lane == 0 && !op.gelu.z.data) store_tile<P>(to, op, m, n, shared);
  if (has_gelu) {
    apply_gelu<P, Out>(op, m, n, shared);
    __syncwarp();  // makes the warp converge, because complete warps must arrive at barriers
    // All threads have read the staging tile after this barrier.
    wait_for_threads(STAGED + me.group, GROUP_THREADS);
    if (me.warp != 0) return;
  }
  if (me.lane == 0) wait_until_stores_have_read<0>();
  __syncwarp();  // waits for lane 0, because complete warps must arrive at barriers
  if (!turns.recomputed().is_last(tile)) arrive_for_threads(FREE + me.other(), GROUP_THREADS + WARP_THREADS);
}

// Writes a tile to the staging tile when it is this group's turn, and from there to Y.
template <class P, class Out, class Sums>
__device__ void write_tile(const typename P::CopyY& to, const LowRankGemm& op, const Turns& turns, int tile,
    const Sums& sums, typename P::Shared& shared) {
  const Consumer me = Consumer::me();
  if (!Turns::is_first(tile)) wait_for_threads(FREE + me.group, GROUP_THREADS + WARP_THREADS);
  int m, n;
  turns.recomputed().tiles.template place<P>(tile, m, n);
  stage_tile<P, Out>(op, me, static_cast<uint32_t>(n * typename P::N{}), sums, shared);
  cutlass::arch::fence_view_async_shared();  // makes what this thread wrote visible to the bulk copy
  wait_for_threads(STAGED + me.group, GROUP_THREADS);
  finish_tile<P, Out>(to, op, turns, recompute_from(tile), shared);
}

// Computes the tiles of this warp group. The sums and the operands of the main loop leave few registers. Values that
// are needed only after the main loop are therefore computed there, and not before.
template <class P, class Out>
__device__ void multiply_in_turn(
    const typename P::CopyY& to, const LowRankGemm& op, const Turns& turns, typename P::Shared& shared) {
  const Tiles& tiles = turns.tiles;
  const int thread = static_cast<int>(threadIdx.x % GROUP_THREADS);
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

  RingPlace place;
  place.skip(Consumer::me().group * tiles.steps);
  const auto release = [&](int stage) {
    if (thread < PAIR) shared.empty[stage].arrive(static_cast<uint32_t>(thread));
  };
  int tile = Turns::first() + Consumer::me().group * turns.recomputed().stride;
  for (; tile < turns.recomputed().count; tile += P::CONSUMERS * turns.recomputed().stride, place.skip(tiles.steps)) {
    // The first product of a tile sets the sums. They are declared here, so that they occupy no registers before.
    Tensor y = partition_fragment_C(mma, Shape<typename P::M, typename P::N>{});
    Tensor h = partition_fragment_C(mma_h, Shape<typename P::M, typename P::R>{});
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
      warpgroup_wait<1>();  // waits for the previous step, whose buffers are then free
      warpgroup_fence_operand(y);
      if constexpr (P::RANKS > 0) warpgroup_fence_operand(h);
      if (last >= 0) release(last);
      last = place.stage;
      place.next();
    };
    if (!Turns::is_first(tile)) wait_for_threads(TURN + Consumer::me().group, P::CONSUMERS * GROUP_THREADS);
    // The last step of the tail is only as deep as the rank needs.
    const bool is_short = P::RANKS == 0 && tiles.last_depth < 4;
    const int whole_steps = P::RANKS > 0 ? tiles.main_steps : is_short ? tiles.steps - 1 : tiles.steps;
    multiply_step(_4{});  // separately, so that the compiler knows that it does not read the sums
#pragma unroll 1
    for (int step = 1; step < whole_steps; ++step) multiply_step(_4{});
    if constexpr (P::RANKS == 0) {
      if (tiles.last_depth == 1) multiply_step(_1{});
      if (tiles.last_depth == 2) multiply_step(_2{});
      if (tiles.last_depth == 3) multiply_step(_3{});
    }
    // The operand of the tail must have arrived before the other group may wait for the next operands in this buffer. A
    // barrier has only the parity of its phase, so that a wait would else end one phase too early.
    if constexpr (P::RANKS > 0) shared.full[place.stage].wait(place.round);
    if (!turns.recomputed().is_last(tile))
      arrive_for_threads(TURN + Consumer::me().other(), P::CONSUMERS * GROUP_THREADS);
    warpgroup_wait<0>();
    warpgroup_fence_operand(y);
    if constexpr (P::RANKS > 0) {
      warpgroup_fence_operand(h);
      release(last);
      uint32_t own[P::PARTS][P::HALF];
      exchange_h<P, Out>(op, turns, recompute_from(tile), h, own, shared);
      const int slot = Consumer::me().slot();
      // One part of the tile after the other, because the registers do not hold the operands of both.
#pragma unroll
      for (int part = 0; part < P::PARTS; ++part) {
        // The rounded sums of 16 columns of H have the layout of the left operand of a product over these columns.
        constexpr int DEPTH = P::RANKS / 16;
        Tensor h_left = make_tensor<typename P::T>(make_layout(make_shape(Shape<_2, _2, _2>{}, _1{}, Int<DEPTH>{})));
        join_halves<P>(own[part], shared.other_half[slot][part], recast<uint32_t>(h_left));
        Tensor of_part = make_tensor(y(_, part, _0{}).data(), make_layout(make_shape(shape<0>(y), _1{}, _1{})));
        warpgroup_fence_operand(of_part);
        warpgroup_fence_operand(h_left);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) gemm(mma_tail, h_left(_, _, k), right_tail(_, _, k, place.stage), of_part);
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(of_part);
      }
      last = place.stage;
      place.next();
    }
    release(last);
    write_tile<P, Out>(to, op, turns, recompute_from(tile), y, shared);
  }
}

template <class P, class Out>
__global__ void __launch_bounds__(P::THREADS, 1)
    lowrank_gemm_pingpong_sm90_kernel(const __grid_constant__ Operands<P> from,
        const __grid_constant__ typename P::CopyY to, const __grid_constant__ LowRankGemm op, const Turns turns) {
  start_next_kernel();
  typename P::Shared& shared = *reinterpret_cast<typename P::Shared*>(shared_memory());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      shared.full[stage].init(1);
      shared.empty[stage].init(PAIR);  // one group of each block reads a buffer
    }
    if constexpr (P::SHARES_H)
      for (auto& barrier : shared.has_half) barrier.init(1);
    cutlass::arch::fence_barrier_init();
  }
  cluster_arrive_relaxed();
  cluster_wait();  // the barriers of both blocks are initialized
  __syncthreads();
  if (threadIdx.x == 0) {
    prefetch_maps<P>(from);
    prefetch_tensor_map(to.get_tma_descriptor());
  }
  __syncwarp();
  wait_for_kernel_in_front();

  if (threadIdx.x < GROUP_THREADS) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    if (threadIdx.x == 0) copy_tiles<P>(from, op, turns.tiles, turns.stride, shared);
    __syncwarp();  // waits for lane 0, because complete warps must reach the barrier of the cluster below
  } else {
    cutlass::arch::warpgroup_reg_alloc<240>();
    multiply_in_turn<P, Out>(to, op, turns, shared);
  }
  // This block must not end yet, because the other block of the pair may still arrive at its barriers.
  cluster_arrive();
  cluster_wait();
}

template <class P, class Out>
cudaError_t launch_product(const LowRankGemm& op, cudaStream_t stream) {
  const Operands<P> from = operands_of<P>(op);
  const typename P::CopyY to = P::copy_y(op.Y, static_cast<int>(op.M), static_cast<int>(op.N));
  if (!are_encoded(from) || !is_encoded(to.get_tma_descriptor())) return cudaErrorInvalidValue;
  const Tiles tiles = Tiles::of<P>(op);
  const Turns turns{tiles, std::min(tiles.count(), multiprocessors() / PAIR), tiles.count()};
  const LaunchShape shape{dim3(static_cast<unsigned>(PAIR * turns.stride)), P::THREADS, PAIR, true};
  return launch<lowrank_gemm_pingpong_sm90_kernel<P, Out>, sizeof(typename P::Shared), SHARED_OF_SM90>(
      shape, stream, from, to, op, turns);
}

// Returns the modeled time of a launch. The unit is the time in which a multiprocessor multiplies one column of a tile
// over a depth of 1. The tiles of a block follow each other without gaps, because only the last tile of a block is
// written while no other group multiplies. Each tile also computes its columns of H.
template <class P>
int64_t wave_cost(const LowRankGemm& op) {
  constexpr int64_t WRITING = 128;  // the time to write a column of a tile; an estimate, because nothing was measured
  const Tiles tiles = Tiles::of<P>(op);
  const int64_t rounds = ceil_div(tiles.count(), multiprocessors() / PAIR);
  const int64_t depth = int64_t{64} * tiles.main_steps;
  const int64_t tail = P::RANKS > 0 ? P::RANKS : ceil_div(op.R, 16) * 16;
  const int64_t columns = typename P::N{}, beside = P::RANKS > 0 ? int64_t{typename P::R{}} : 0;
  return rounds * (depth * (columns + beside) + tail * columns) + WRITING * columns;
}

template <class T, class Out, bool TRANSPOSED, int RANKS>
cudaError_t launch_tile(const LowRankGemm& op, cudaStream_t stream) {
  using Wide = PingPong<T, TRANSPOSED, 192, RANKS>;
  using Narrow = PingPong<T, TRANSPOSED, 128, RANKS>;
  return wave_cost<Wide>(op) <= wave_cost<Narrow>(op) ? launch_product<Wide, Out>(op, stream)
                                                      : launch_product<Narrow, Out>(op, stream);
}

template <class T, class Out, int RANKS>
cudaError_t launch_order(const LowRankGemm& op, cudaStream_t stream) {
  return op.transposed ? launch_tile<T, Out, true, RANKS>(op, stream) : launch_tile<T, Out, false, RANKS>(op, stream);
}

template <class T, class Out>
cudaError_t launch_type(const LowRankGemm& op, cudaStream_t stream) {
  if (!op.P.data) return launch_order<T, Out, 0>(op, stream);
  return op.R <= MADE_RANKS / 2 ? launch_order<T, Out, MADE_RANKS / 2>(op, stream)
                                : launch_order<T, Out, MADE_RANKS>(op, stream);
}

}  // namespace

cudaError_t lowrank_gemm_pingpong_sm90(const LowRankGemm& op, cudaStream_t stream) {
  return op.A.type == Type::bfloat16 ? launch_type<cutlass::bfloat16_t, bf16>(op, stream)
                                     : launch_type<cutlass::half_t, fp16>(op, stream);
}

}  // namespace efft
