// Computes the forward and backward passes of an adapted layer for a range of tokens, except the product with the
// frozen weight, which torch computes. The structs Forward and Backward in kernels.h state the formulas. The layer may
// have a producer, a GELU or layer norm that runs directly before it.
//
// The tokens are processed in blocks. All steps of a pass (the producer, the product h = a D or dh = gy G^T, and the
// products with h or dh) are computed for one block before the next block begins. A block is so small that its rows of
// all matrices usually stay in the second-level cache between these steps.
#pragma once

#include <type_traits>

#include "activations.h"
#include "buffer.h"
#include "kernels.h"
#include "matrix_tiles.h"

namespace efft::EFFT_ISA {

// Calls f(float{}) or f(bf16{}), depending on `type`.
template <class F>
auto with_type(Type type, F f) {
  return type == Type::float32 ? f(float{}) : f(bf16{});
}

template <class T>
T* row_of(const Matrix& matrix, int64_t i) {
  return static_cast<T*>(matrix.data) + i * matrix.row;
}

// Returns rows begin .. begin + rows - 1 of a matrix of T as floats. If T is float, the result points into the matrix.
// Otherwise the rows are converted into `buffer`.
template <class T>
Rows<const float> widen(const Matrix& from, int64_t begin, int64_t rows, int64_t columns, Buffer<float>& buffer) {
  if constexpr (std::is_same_v<T, float>) {
    return {row_of<float>(from, begin), from.row};
  } else {
    float* const wide = buffer.room(rows * columns);
    for (int64_t i = 0; i < rows; ++i) {
      const T* source = row_of<T>(from, begin + i);
      float* target = wide + i * columns;
      for_registers(columns, [&](int64_t j, int count) { store(target + j, load(source + j, count), count); });
    }
    return {wide, columns};
  }
}

// Returns rows begin .. begin + rows - 1 of a matrix of T in the type that products multiply, Element<T>. If this is T,
// the result points into the matrix. Otherwise it is float, and the rows are converted into `buffer`.
template <class T>
Rows<const Element<T>> elements(
    const Matrix& from, int64_t begin, int64_t rows, int64_t columns, Buffer<float>& buffer) {
  if constexpr (std::is_same_v<T, Element<T>>)
    return {row_of<const T>(from, begin), from.row};
  else
    return widen<T>(from, begin, rows, columns, buffer);
}

// Plans the prefetch of the next block of the matrix `of` [.., width] of T while a product for the current block is
// computed. The current block consists of rows t .. t + rows - 1. The next block has as many rows, or fewer if it
// reaches row `end`. The product has m rows and n columns, and each of its elements is a sum over k elements of type E.
// If there are gaps between the rows of the matrix, nothing is prefetched.
template <class T, class E>
Ahead next_block(
    const Matrix& of, int64_t t, int64_t rows, int64_t end, int64_t width, int64_t m, int64_t n, int64_t k) {
  if (of.row != width) return {};
  return ahead_of<E>(row_of<const T>(of, t + rows), std::min(rows, end - t - rows) * width * sizeof(T), m, n, k);
}

// Rounds `values` to T, and writes them to rows begin .. begin + rows - 1 of `to` unless its data is null. Also returns
// the rounded values in the type that products multiply, Element<T>. If this type is float, they replace the floats in
// `values`. Otherwise they are in `buffer`.
template <class T>
Rows<const Element<T>> round_rows(
    Rows<float> values, int64_t rows, int64_t columns, const Matrix& to, int64_t begin, Buffer<bf16>& buffer) {
  using E = Element<T>;
  Rows<E> result{nullptr, values.row};
  if constexpr (std::is_same_v<E, float>) {
    result.data = values.data;
  } else {
    result.data = buffer.room(rows * values.row);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* value = values.data + i * values.row;
    T* target = to.data ? row_of<T>(to, begin + i) : nullptr;
    for_registers(columns, [&](int64_t j, int count) {
      const Floats wide = load(value + j, count);
      if (target) store(target + j, wide, count);
      if constexpr (std::is_same_v<E, bf16>) {
        store(result.data + i * result.row + j, wide, count);
      } else if constexpr (!std::is_same_v<T, float>) {
        T narrow[LANES];
        store(narrow, wide);
        store(result.data + i * result.row + j, load(narrow), count);
      }
    });
  }
  return {result.data, result.row};
}

// The buffers of one thread. They grow to the size that the thread's largest call needs. In the passes of a layer, a
// buffer contains one matrix for a block of tokens (see block_rows). In contract.h, it contains one matrix for a layer
// and core.
struct Scratch {
  Buffer<float> x, a, slope, da, gy, h, narrow, wide;
  Buffer<bf16> half_a, half_narrow, left, turned, right;
};

inline Scratch& scratch() {
  thread_local Scratch instance;
  return instance;
}

// Returns the number of tokens of a block. The rows of a block should occupy at most a megabyte together. Each token
// has one row of width d_out and one row of width d_in, or three rows of width d_in with a producer. A block has at
// least 16 tokens, even if their rows occupy more, and at most 128 tokens.
template <class E>
int64_t block_rows(const LowRank& op) {
  const int64_t per_row = sizeof(E) * ((op.producer == Producer::none ? 1 : 3) * op.d_in + op.d_out);
  return std::clamp<int64_t>((1 << 20) / std::max<int64_t>(per_row, 1) / ROWS_TOGETHER<E> * ROWS_TOGETHER<E>, 16, 128);
}

// The matrices of a block of tokens: the producer's input x as floats, and its output a, rounded to T. Without a
// producer, x is not set and a is the input of the layer.
template <class T>
struct Block {
  Rows<const float> x;
  Rows<const Element<T>> a;
  const float* slope = nullptr;  // [rows, d_in]: the derivatives of a GELU; only in the backward pass
};

// Computes one row of a GELU, and its derivatives unless `slope` is null.
inline void gelu_row(const LowRank& op, const float* z, float* a, float* slope) {
  for_registers(op.d_in, [&](int64_t j, int count) {
    const Floats at = load(z + j, count);
    const Gelu of = op.producer == Producer::gelu ? gelu(at) : gelu_tanh(at);
    store(a + j, of.value, count);
    if (slope) store(slope + j, of.slope, count);
  });
}

// Computes the producer for `rows` tokens from token t on, and returns the matrices of this block. X is the type of
// op.x. In the forward pass, the function also writes a to `out`, and it writes the mean and rstd of a norm. In the
// backward pass, `out` has no data; the function reads mean and rstd, and computes the derivatives of a GELU.
template <class X, class T>
Block<T> block_at(const LowRank& op, int64_t t, int64_t rows, bool is_forward, const Matrix& out) {
  Scratch& space = scratch();
  if (op.producer == Producer::none) return {{}, elements<T>(op.x, t, rows, op.d_in, space.x)};
  const Rows<const float> x = widen<X>(op.x, t, rows, op.d_in, space.x);
  const Rows<float> a{space.a.room(rows * op.d_in), op.d_in};
  float* const slopes = !is_forward && op.producer != Producer::norm ? space.slope.room(rows * op.d_in) : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = x.data + i * x.row;
    float* out_row = a.data + i * a.row;
    if (op.producer != Producer::norm) {
      gelu_row(op, row, out_row, slopes ? slopes + i * op.d_in : nullptr);
      continue;
    }
    if (is_forward) {
      const Moments of = moments(row, op.d_in, op.eps);
      op.mean[t + i] = of.mean;
      op.rstd[t + i] = of.rstd;
    }
    normalize(row, op.d_in, {op.mean[t + i], op.rstd[t + i]}, op.gamma, op.beta, out_row);
  }
  return {x, round_rows<T>(a, rows, op.d_in, out, t, space.half_a), slopes};
}

// Computes C [rows, columns] = init + left right, where right [rank, columns] is stored in strips. It computes a few
// entire rows of C at a time, and prefetches the following rows of C meanwhile.
template <class E, class Init, class Out>
void up(
    int64_t rows, int64_t columns, int64_t rank, Rows<const E> left, const void* right, Base<Init> init, Rows<Out> C) {
  constexpr int64_t together = TOGETHER<E>;  // a plain name, because cppcheck takes TOGETHER<E> below for a comparison
  constexpr int64_t width = STRIP_COLUMNS * together;
  const int64_t strip = (rank + together - 1) / together * width;
  constexpr int64_t step = ROWS_TOGETHER<E>;
  for (int64_t i = 0; i < rows; i += step) {
    const int64_t count = std::min(step, rows - i);
    Ahead ahead;
    if (C.row == columns)
      ahead = ahead_of<E>(C.data + (i + step) * C.row, step * columns * sizeof(Out), step, columns, rank);
    const E* at = static_cast<const E*>(right);
    for (int64_t j = 0; j < columns; j += STRIP_COLUMNS, at += strip)
      product(count, std::min(STRIP_COLUMNS, columns - j), rank,
          Operand<E>{left.data + i * left.row, left.row, TOGETHER<E>}, Rows<const E>{at, width}, init.from(i, j),
          Rows<Out>{C.data + i * C.row + j, C.row}, ahead);
  }
}

// Returns the matrix to which a rank-r product is added: the base product from row t on, if there is one, plus a bias.
template <class T>
Base<T> base_of(const LowRank& op, int64_t t, const float* bias = nullptr) {
  return {op.base.data ? row_of<const T>(op.base, t) : nullptr, op.base.row, bias};
}

// Computes C [rows, padded_rank] = left right, where right is a panel [depth, padded_rank].
template <class E>
void down(int64_t rows, int64_t depth, int64_t padded_rank, Rows<const E> left, const void* right, Rows<float> C,
    Ahead ahead = {}) {
  product(rows, padded_rank, depth, Operand<E>{left.data, left.row, TOGETHER<E>},
      Rows<const E>{static_cast<const E*>(right), padded_rank * TOGETHER<E>}, Base<float>{}, C, ahead);
}

// Adds the pending part of the layer before the producer to rows t .. t + rows - 1 of op.x, which are of type T.
template <class T>
void add_pending(const Forward& op, int64_t t, int64_t rows) {
  using E = Element<T>;
  const Rows<const E> h = elements<T>(op.pending.h, t, rows, op.pending.rank, scratch().h);
  const Base<T> base{row_of<const T>(op.x, t), op.x.row, op.pending.b};
  up(rows, op.d_in, op.pending.rank, h, op.pending.G, base, Rows<T>{row_of<T>(op.x, t), op.x.row});
}

// Implements Kernels::forward. T is the type of W, y and h, and X is the type of x.
template <class X, class T>
void forward(const Forward& op, int64_t begin, int64_t end) {
  using E = Element<T>;
  [[maybe_unused]] const MatrixRegisters<E> registers;
  Scratch& space = scratch();
  const int64_t block = block_rows<E>(op);
  const Rows<float> wide{space.narrow.room(block * op.padded_rank), op.padded_rank};
  for (int64_t t = begin; t < end; t += block) {
    const int64_t rows = std::min(block, end - t);
    if constexpr (std::is_same_v<X, T>) {
      if (op.pending.G) add_pending<T>(op, t, rows);
    }
    const Rows<const E> a = block_at<X, T>(op, t, rows, true, op.a).a;
    down(rows, op.d_in, op.padded_rank, a, op.D, wide,
        next_block<X, E>(op.x, t, rows, end, op.d_in, rows, op.padded_rank, op.d_in));
    const Rows<const E> h = round_rows<T>(wide, rows, op.rank, op.h, t, space.half_narrow);
    if (op.y.data) up(rows, op.d_out, op.rank, h, op.G, base_of<T>(op, t, op.b), Rows<T>{row_of<T>(op.y, t), op.y.row});
  }
}

// Adds left^T right to total [rank, columns], which is stored in strips. left [rows, rank] and right [rows, columns]
// belong to one block of tokens. The first block overwrites total.
template <class E>
void share(int64_t rank, int64_t columns, int64_t rows, Rows<const E> left, Rows<const E> right, float* total,
    bool is_first, Ahead ahead) {
  Operand<E> A{left.data, 1, left.row};
  int64_t depth = rows;
  if constexpr (TOGETHER<E> == 2) {
    Scratch& space = scratch();
    depth = (rows + 1) / 2 * 2;
    A = transposed(left, rows, rank, space.left, space.turned);
  }
  for (int64_t j = 0; j < columns; j += STRIP_COLUMNS, total += rank * STRIP_COLUMNS) {
    const int64_t width = std::min(STRIP_COLUMNS, columns - j);
    Rows<const E> B{right.data + j, right.row};
    if constexpr (TOGETHER<E> == 2)
      B = interleave(B, rows, width, STRIP_COLUMNS, scratch().right.room(depth * STRIP_COLUMNS));
    product(rank, width, depth, A, B, Base<float>{is_first ? nullptr : total, STRIP_COLUMNS},
        Rows<float>{total, STRIP_COLUMNS}, ahead);
  }
}

// The number of registers in which rows are summed in parallel, so that an addition need not wait for the previous one.
constexpr int SUMS_TOGETHER = 4;

// Divides a row into groups of N adjacent registers, and calls f(j, count, std::integral_constant<int, N>) for each
// group, where j is the first column. N is SUMS_TOGETHER while that many full registers remain, then 1. `count` is the
// number of columns in the last register of the group.
template <class F>
inline void for_sums(int64_t columns, const F& f) {
  constexpr int64_t width = int64_t{SUMS_TOGETHER} * LANES;
  const int64_t whole = columns / width * width;
  for (int64_t j = 0; j < whole; j += width) f(j, LANES, std::integral_constant<int, SUMS_TOGETHER>{});
  for_registers(columns - whole, [&](int64_t j, int count) { f(whole + j, count, std::integral_constant<int, 1>{}); });
}

// Adds N registers of sums over one block of tokens to total. The first block overwrites total.
template <int N>
EFFT_INLINE void add_sums(Floats (&sums)[N], float* total, int count, bool is_first) {
#pragma GCC unroll 4
  for (int64_t n = 0; n < N; ++n) {
    if (!is_first) sums[n] += load(total + n * LANES, count);
    store(total + n * LANES, sums[n], count);
  }
}

// Adds the sum of the rows of a block to total [columns]. The first block overwrites total.
template <class E>
void sum_rows(int64_t rows, int64_t columns, Rows<const E> of, float* total, bool is_first) {
  for_sums(columns, [&](int64_t j, int count, auto registers) {
    constexpr int N = decltype(registers)::value;
    // The rows are first summed in groups of a few rows, because the rounding error of a sum grows with its length.
    constexpr int64_t FEW = 16;
    Floats sums[N]{};
    for (int64_t first = 0; first < rows; first += FEW) {
      Floats some[N]{};
      for (int64_t i = first; i < std::min(first + FEW, rows); ++i) {
#pragma GCC unroll 4
        for (int64_t n = 0; n < N; ++n) some[n] += load(of.data + i * of.row + j + n * LANES, count);
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[n] += some[n];
    }
    add_sums(sums, total + j, count, is_first);
  });
}

// Adds the sums over a block that the gradients of a norm's parameters need. dn [rows, d_in] is the gradient of the
// norm's output. The sum of dn (x - mean) rstd is added to dgamma [d_in], and the sum of dn to dbeta [d_in]. The first
// block overwrites both.
inline void sum_norm(
    const LowRank& op, int64_t t, int64_t rows, const float* dn, Rows<const float> x, const Shares& to, bool is_first) {
  for_sums(op.d_in, [&](int64_t j, int count, auto registers) {
    constexpr int N = decltype(registers)::value;
    Floats along[N]{}, total[N]{};
    for (int64_t i = 0; i < rows; ++i) {
      const float mean = op.mean[t + i], rstd = op.rstd[t + i];
#pragma GCC unroll 4
      for (int64_t n = 0; n < N; ++n) {
        const Floats gradient = load(dn + i * op.d_in + j + n * LANES, count);
        along[n] += gradient * ((load(x.data + i * x.row + j + n * LANES, count) - mean) * rstd);
        total[n] += gradient;
      }
    }
    add_sums(along, to.dgamma + j, count, is_first);
    add_sums(total, to.dbeta + j, count, is_first);
  });
}

// Computes the gradient of the producer's output, base + dh D^T. From this gradient it computes dx, and the sums for
// the gradients of a norm's parameters, if they are needed.
template <class X, class T>
void through_producer(const Backward& op, int64_t t, int64_t rows, Rows<const Element<T>> dh, const Block<T>& block,
    const Shares& to, bool is_first) {
  float* const gradient = scratch().da.room(rows * op.d_in);
  up(rows, op.d_in, op.rank, dh, op.Dt, base_of<T>(op, t), Rows<float>{gradient, op.d_in});
  if (to.dgamma) sum_norm(op, t, rows, gradient, block.x, to, is_first);
  if (!op.dx.data) return;
  for (int64_t i = 0; i < rows; ++i) {
    const float* da = gradient + i * op.d_in;
    X* dx = row_of<X>(op.dx, t + i);
    if (op.producer == Producer::norm) {
      normalize_backward(da, block.x.data + i * block.x.row, op.d_in, {op.mean[t + i], op.rstd[t + i]}, op.gamma, dx);
      continue;
    }
    const float* slope = block.slope + i * op.d_in;
    for_registers(
        op.d_in, [&](int64_t j, int count) { store(dx + j, load(da + j, count) * load(slope + j, count), count); });
  }
}

// Implements Kernels::backward. T is the type of W, gy and h, and X is the type of x.
template <class X, class T>
void backward(const Backward& op, int64_t begin, int64_t end, const Shares& to) {
  using E = Element<T>;
  [[maybe_unused]] const MatrixRegisters<E> registers;
  Scratch& space = scratch();
  const int64_t block = block_rows<E>(op);
  const bool plain = op.producer == Producer::none, need_da = op.dx.data || to.dgamma;
  const Rows<float> wide{space.narrow.room(block * op.padded_rank), op.padded_rank};
  for (int64_t t = begin; t < end; t += block) {
    const int64_t rows = std::min(block, end - t);
    const bool is_first = t == begin;
    const Rows<const E> gy = elements<T>(op.gy, t, rows, op.d_out, space.gy);
    Rows<const E> dh{};
    // dh is computed before dG, because this step reads gy row by row, and gy is then in the cache for dG.
    if (need_da || to.dDt) {
      down(rows, op.d_out, op.padded_rank, gy, op.Gt, wide);
      dh = round_rows<T>(wide, rows, op.rank, {}, t, space.half_narrow);
    }
    if (to.dG) {
      const Rows<const E> h = elements<T>(op.h, t, rows, op.rank, space.h);
      share(op.rank, op.d_out, rows, h, gy, to.dG, is_first,
          next_block<T, E>(op.gy, t, rows, end, op.d_out, op.rank, op.d_out, rows));
    }
    if (to.db) sum_rows(rows, op.d_out, gy, to.db, is_first);
    Block<T> current{};
    if (to.dDt || (need_da && !plain)) current = block_at<X, T>(op, t, rows, false, {});
    if (to.dDt)
      share(op.rank, op.d_in, rows, dh, current.a, to.dDt, is_first,
          next_block<X, E>(op.x, t, rows, end, op.d_in, op.rank, op.d_in, rows));
    if (need_da && plain)
      up(rows, op.d_in, op.rank, dh, op.Dt, base_of<T>(op, t), Rows<T>{row_of<T>(op.dx, t), op.dx.row});
    else if (need_da)
      through_producer<X, T>(op, t, rows, dh, current, to, is_first);
  }
}

inline void forward(const Forward& op, int64_t begin, int64_t end) {
  with_type(op.x.type,
      [&](auto x) { with_type(op.y.type, [&](auto y) { forward<decltype(x), decltype(y)>(op, begin, end); }); });
}

inline void backward(const Backward& op, int64_t begin, int64_t end, const Shares& to) {
  with_type(op.x.type, [&](auto x) {
    with_type(op.gy.type, [&](auto gy) { backward<decltype(x), decltype(gy)>(op, begin, end, to); });
  });
}

}  // namespace efft::EFFT_ISA
