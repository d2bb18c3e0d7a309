// Both passes of tt_linear and of its forms behind a GELU and a layer norm, over a range of tokens: block by block, so
// that a block's rows, h, dh and both rank-r products meet in the second-level cache.
#pragma once

#include <vector>

#include "activations.h"
#include "kernels.h"
#include "product.h"

namespace efft::EFFT_ISA {

template <class T>
T* row_of(const Matrix& matrix, int64_t i) {
  return static_cast<T*>(matrix.data) + i * matrix.row;
}

// A block's floats: the matrix itself where it is float, else its rows widened into `buffer`.
template <class T>
Rows<const float> widen(const Matrix& from, int64_t begin, int64_t rows, int64_t columns, std::vector<float>& buffer) {
  if constexpr (std::is_same_v<T, float>) {
    return {row_of<float>(from, begin), from.row};
  } else {
    buffer.resize(rows * columns);
    for (int64_t i = 0; i < rows; ++i) {
      const T* source = row_of<T>(from, begin + i);
      float* target = buffer.data() + i * columns;
      for_registers(columns, [&](int64_t j, int count) { store(target + j, load(source + j, count), count); });
    }
    return {buffer.data(), columns};
  }
}

// Rounds floats to T in place, and writes them to `to` where it has data.
template <class T>
void round_rows(Rows<float> values, int64_t rows, int64_t columns, const Matrix& to, int64_t begin) {
  for (int64_t i = 0; i < rows; ++i) {
    float* value = values.data + i * values.row;
    T* target = to.data ? row_of<T>(to, begin + i) : nullptr;
    for_registers(columns, [&](int64_t j, int count) {
      T rounded[LANES];
      const Floats wide = load(value + j, count);
      store(rounded, wide);
      if (target) store(target + j, wide, count);
      if constexpr (!std::is_same_v<T, float>) store(value + j, load(rounded), count);
    });
  }
}

// Grown, never shrunk: a fresh allocation of this size would fault in its pages on every call.
struct Scratch {
  std::vector<float> x, gy, h, narrow, a, slope, wide;
};

inline Scratch& scratch() {
  thread_local Scratch instance;
  return instance;
}

// Tokens such that a block of everything that is read and written takes about a megabyte.
inline int64_t block_rows(const LowRank& op) {
  const int64_t per_row = 4 * ((op.input == Input::plain ? 1 : 3) * op.d_in + op.d_out);
  return std::clamp<int64_t>((1 << 20) / std::max<int64_t>(per_row, 1) / 8 * 8, 16, 128);
}

inline Gelu gelu_of(Input kind, Floats z) { return kind == Input::gelu ? gelu(z) : gelu_tanh(z); }

// The input stage of one row: a, and the slope of a GELU.
inline void input_row(const LowRank& op, const float* x, Moments of, float* a, float* slope) {
  if (op.input == Input::norm) {
    normalize(x, op.d_in, of, op.gamma, op.beta, a);
    return;
  }
  for_registers(op.d_in, [&](int64_t j, int count) {
    const Gelu at = gelu_of(op.input, load(x + j, count));
    store(a + j, at.value, count);
    if (slope) store(slope + j, at.slope, count);
  });
}

// T: of W, y and h. X: of x.
template <class X, class T>
void forward(const Forward& op, int64_t begin, int64_t end) {
  Scratch& space = scratch();
  const int64_t block = block_rows(op);
  space.narrow.resize(block * op.padded_rank);
  const Rows<float> h{space.narrow.data(), op.padded_rank};
  for (int64_t t = begin; t < end; t += block) {
    const int64_t rows = std::min(block, end - t);
    Rows<const float> a = widen<X>(op.x, t, rows, op.d_in, space.x);
    if (op.input != Input::plain) {
      space.a.resize(block * op.d_in);
      for (int64_t i = 0; i < rows; ++i) {
        const float* x = a.data + i * a.row;
        Moments of{};
        if (op.input == Input::norm) {
          of = moments(x, op.d_in, op.eps);
          op.mean[t + i] = of.mean;
          op.rstd[t + i] = of.rstd;
        }
        input_row(op, x, of, space.a.data() + i * op.d_in, nullptr);
      }
      a = {space.a.data(), op.d_in};
      round_rows<T>({space.a.data(), op.d_in}, rows, op.d_in, op.a, t);
    }
    product(rows, op.padded_rank, op.d_in, {a.data, a.row, 1}, {op.D, op.padded_rank}, Rows<const float>{}, h);
    round_rows<T>(h, rows, op.rank, op.h, t);
    product(rows, op.d_out, op.rank, {h.data, h.row, 1}, {row_of<const float>(op.G, 0), op.G.row},
            Rows<const float>{op.b, 0}, Rows<T>{row_of<T>(op.y, t), op.y.row});
  }
}

// total [rank, columns], in strips, += left^T right over a block of tokens; the first one needs no zeros to start from.
inline void share(int64_t rank, int64_t columns, int64_t rows, Rows<const float> left, Rows<const float> right,
                  float* total, bool is_first) {
  for (int64_t j = 0; j < columns; j += STRIP_COLUMNS, total += rank * STRIP_COLUMNS)
    product(rank, std::min(STRIP_COLUMNS, columns - j), rows, {left.data, 1, left.row}, {right.data + j, right.row},
            Rows<const float>{is_first ? nullptr : total, STRIP_COLUMNS}, Rows<float>{total, STRIP_COLUMNS});
}

template <class X, class T>
void backward(const Backward& op, int64_t begin, int64_t end, float* dDt, float* dG) {
  Scratch& space = scratch();
  const int64_t block = block_rows(op);
  const bool need_dx = op.dx.data != nullptr;
  space.narrow.resize(block * op.padded_rank);
  const Rows<float> dh{space.narrow.data(), op.padded_rank};
  for (int64_t t = begin; t < end; t += block) {
    const int64_t rows = std::min(block, end - t);
    const Rows<const float> gy = widen<T>(op.gy, t, rows, op.d_out, space.gy);
    if (op.need_dG) {
      const Rows<const float> h = widen<T>(op.h, t, rows, op.rank, space.h);
      share(op.rank, op.d_out, rows, h, gy, dG, t == begin);
    }
    if (!need_dx && !op.need_dD) continue;
    product(rows, op.padded_rank, op.d_out, {gy.data, gy.row, 1}, {op.Gt, op.padded_rank}, Rows<const float>{}, dh);
    round_rows<T>(dh, rows, op.rank, {}, t);
    const Operand left{dh.data, dh.row, 1};
    const Rows<const float> Dt{row_of<const float>(op.Dt, 0), op.Dt.row};
    if (op.input == Input::plain) {
      if (op.need_dD) {
        const Rows<const float> x = widen<T>(op.x, t, rows, op.d_in, space.x);
        share(op.rank, op.d_in, rows, {dh.data, dh.row}, x, dDt, t == begin);
      }
      if (need_dx) product(rows, op.d_in, op.rank, left, Dt, Rows<const float>{}, Rows<T>{row_of<T>(op.dx, t), op.dx.row});
      continue;
    }
    const Rows<const float> x = widen<X>(op.x, t, rows, op.d_in, space.x);
    const bool is_norm = op.input == Input::norm;
    if (op.need_dD || !is_norm) {
      space.a.resize(block * op.d_in);
      if (!is_norm) space.slope.resize(block * op.d_in);
      for (int64_t i = 0; i < rows; ++i)
        input_row(op, x.data + i * x.row, is_norm ? Moments{op.mean[t + i], op.rstd[t + i]} : Moments{},
                  space.a.data() + i * op.d_in, is_norm ? nullptr : space.slope.data() + i * op.d_in);
    }
    if (op.need_dD) {
      const Rows<float> a{space.a.data(), op.d_in};
      round_rows<T>(a, rows, op.d_in, {}, t);
      share(op.rank, op.d_in, rows, {dh.data, dh.row}, {a.data, a.row}, dDt, t == begin);
    }
    if (!need_dx) continue;
    space.wide.resize(block * op.d_in);
    const Rows<const T> base{row_of<const T>(op.base, t), op.base.row};
    product(rows, op.d_in, op.rank, left, Dt, base, Rows<float>{space.wide.data(), op.d_in});
    for (int64_t i = 0; i < rows; ++i) {
      const float* da = space.wide.data() + i * op.d_in;
      X* dx = row_of<X>(op.dx, t + i);
      if (is_norm) {
        normalize_backward(da, x.data + i * x.row, op.d_in, {op.mean[t + i], op.rstd[t + i]}, op.gamma, dx);
        continue;
      }
      const float* slope = space.slope.data() + i * op.d_in;
      for_registers(op.d_in, [&](int64_t j, int count) { store(dx + j, load(da + j, count) * load(slope + j, count), count); });
    }
  }
}

}  // namespace efft::EFFT_ISA
