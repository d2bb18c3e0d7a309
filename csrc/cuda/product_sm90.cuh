// Defines the types for the product in lowrank_gemm_sm90.cu, Y = A B + bias + H T with H = A P: instructions, layouts
// in shared memory, and tensor maps (descriptors of matrices for the copy instructions of TMA).
#pragma once

// clang-format off: CuTe must come before the other headers of CUTLASS, which do not compile without it
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>
// clang-format on

#include "kernels.h"

namespace efft {

using namespace cute;  // NOLINT: only lowrank_gemm_sm90.cu includes this file

// The number of blocks in a pair, and the number of buffers in the ring through which operands are copied.
constexpr int PAIR = 2, STAGES = 4;
constexpr size_t SHARED_OF_SM90 = 227 * 1024;

// The product that a block computes for one tile of Y.
// - The type T is that of the operands, a type of CUTLASS.
// - TRANSPOSED states whether the matrices B and T are stored transposed, as [N, K] and [N, R].
// - GROUPS is the number of warp groups that multiply; each owns 64 rows of the tile.
// - COLUMNS is the number of columns of the tile.
// - RANKS is the largest number of columns of H that the kernel can compute, or 0 if it reads H.
// - SECOND selects the second generation of the kernel.
template <class T_, bool TRANSPOSED, int GROUPS_, int COLUMNS, int RANKS_, bool SECOND_>
struct Product {
  using T = T_;
  static constexpr bool SECOND = SECOND_;
  static constexpr int GROUPS = GROUPS_, RANKS = RANKS_, THREADS = 128 * (1 + GROUPS);
  using M = Int<64 * GROUPS>;
  using N = Int<COLUMNS>;
  using K = _64;
  // In the second generation, the blocks of a pair that computes H have the same rows of A and adjacent columns of B.
  // Each block computes half of the columns of H and sends them to the other block.
  static constexpr bool SHARES_H = SECOND && RANKS > 0;
  using R = Int<RANKS == 0 ? 32 : SHARES_H ? RANKS / 2 : RANKS>;
  static constexpr int HALF = RANKS / 8;  // number of registers that hold a thread's part of one half of H
  static constexpr GMMA::Major MAJOR = TRANSPOSED ? GMMA::Major::K : GMMA::Major::MN;
  using Groups = Layout<Shape<Int<GROUPS>, _1, _1>>;
  using Mma =
      decltype(make_tiled_mma(GMMA::ss_op_selector<T, T, float, Shape<M, N, K>, GMMA::Major::K, MAJOR>(), Groups{}));
  using MmaH = decltype(make_tiled_mma(
      GMMA::ss_op_selector<T, T, float, Shape<M, R, K>, GMMA::Major::K, GMMA::Major::K>(), Groups{}));
  using MmaTail =
      decltype(make_tiled_mma(GMMA::rs_op_selector<T, T, float, Shape<M, N, _16>, GMMA::Major::K, MAJOR>(), Groups{}));
  using AtomK = GMMA::Layout_K_SW128_Atom<T>;
  using AtomB = std::conditional_t<TRANSPOSED, AtomK, GMMA::Layout_MN_SW128_Atom<T>>;
  using LayoutA = decltype(tile_to_shape(AtomK{}, Shape<M, K, Int<STAGES>>{}));
  using LayoutB = decltype(tile_to_shape(
      AtomB{}, Shape<N, K, Int<STAGES>>{}, std::conditional_t<TRANSPOSED, Step<_1, _2, _3>, Step<_2, _1, _3>>{}));
  using LayoutP = decltype(tile_to_shape(AtomK{}, Shape<R, K, Int<STAGES>>{}));
  static constexpr int BYTES_A = M{} * K{} * sizeof(T), BYTES_B = N{} * K{} * sizeof(T),
                       BYTES_P = RANKS == 0 ? 0 : R{} * K{} * sizeof(T);
  // A warp rearranges rows of the output in shared memory, OUT_COLUMNS columns at a time. There, a row has 8 additional
  // elements, so that the elements of a column are in different banks.
  static constexpr int OUT_COLUMNS = 32, OUT_ROW = OUT_COLUMNS + 8;

  struct alignas(1024) Shared {
    array_aligned<T, cosize_v<LayoutA>, 1024> a;
    array_aligned<T, cosize_v<LayoutB>, 1024> b;
    array_aligned<T, RANKS == 0 ? 8 : cosize_v<LayoutP>, 1024> p;
    alignas(16) T out[4 * GROUPS][16 * OUT_ROW];
    // The half of H that the other block computes, and one barrier per warp, which signals that the warp's part of this
    // half has arrived.
    alignas(16) uint32_t other_half[SHARES_H ? THREADS - 128 : 1][SHARES_H ? HALF : 1];
    cutlass::arch::ClusterTransactionBarrier has_half[4 * GROUPS];
    cutlass::arch::ClusterTransactionBarrier full[STAGES];
    cutlass::arch::ClusterBarrier empty[STAGES];
  };
  static_assert(sizeof(Shared) <= SHARED_OF_SM90);

  static auto by_rows(const Matrix& of, int rows, int columns) {
    return make_tensor(make_gmem_ptr(static_cast<const T*>(of.data)),
        make_layout(make_shape(rows, columns), make_stride(of.row, _1{})));
  }
  static auto copy_a(const Matrix& of, int rows, int columns) {
    return make_tma_copy(SM90_TMA_LOAD{}, by_rows(of, rows, columns), LayoutA{}(_, _, 0), Shape<M, K>{}, _1{});
  }
  static auto copy_left(const Matrix& of, int rows, int columns) {
    if constexpr (SHARES_H)
      return make_tma_copy(
          SM90_TMA_LOAD_MULTICAST{}, by_rows(of, rows, columns), LayoutA{}(_, _, 0), Shape<M, K>{}, Int<PAIR>{});
    else
      return copy_a(of, rows, columns);
  }
  static auto copy_b(const Matrix& of, int columns, int depth) {
    const auto matrix = [&] {
      if constexpr (TRANSPOSED)
        return by_rows(of, columns, depth);
      else  // the matrix is stored as [K, N], and the tensor map describes it as [N, K]
        return make_tensor(make_gmem_ptr(static_cast<const T*>(of.data)),
            make_layout(make_shape(columns, depth), make_stride(_1{}, of.row)));
    }();
    if constexpr (SHARES_H)
      return make_tma_copy(SM90_TMA_LOAD{}, matrix, LayoutB{}(_, _, 0), Shape<N, K>{}, _1{});
    else
      return make_tma_copy(SM90_TMA_LOAD_MULTICAST{}, matrix, LayoutB{}(_, _, 0), Shape<N, K>{}, Int<PAIR>{});
  }
  static auto copy_p(const Matrix& of, int columns, int depth) {
    if constexpr (SHARES_H)
      return make_tma_copy(SM90_TMA_LOAD{}, by_rows(of, columns, depth), LayoutP{}(_, _, 0), Shape<R, K>{}, _1{});
    else
      return make_tma_copy(
          SM90_TMA_LOAD_MULTICAST{}, by_rows(of, columns, depth), LayoutP{}(_, _, 0), Shape<R, K>{}, Int<PAIR>{});
  }
  using CopyA = decltype(copy_left({}, 0, 0));
  using CopyH = decltype(copy_a({}, 0, 0));
  using CopyB = decltype(copy_b({}, 0, 0));
  using CopyP = decltype(copy_p({}, 0, 0));
};

template <class P>
struct Operands {
  typename P::CopyA A;
  typename P::CopyH H;
  typename P::CopyB B, T;
  typename P::CopyP factor;
};

}  // namespace efft
