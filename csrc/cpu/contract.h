// Computes the op tt_contract (the contraction of a tensor train) and its gradients for one layer and one core, and the
// op tt_merge_. The contraction first copies the factors, with dropout masks and scale applied, and then multiplies the
// copies. The struct Contraction in kernels.h states the formula. The functions without a template implement the
// entries of the same names in the struct Kernels. kernels.h describes these entries.
#pragma once

#include <cstring>

#include "low_rank.h"

namespace efft::EFFT_ISA {

// Returns a copy of `from` [rows, columns] as floats, times `scale`. Elements for which the mask `keep` is false are
// zero; a null mask keeps all elements. If `transpose` is set, the result is transposed, and its rows are padded with
// zeros to a multiple of PANEL_COLUMNS elements.
template <class T>
Rows<const float> masked(const Matrix& from, int64_t rows, int64_t columns, const bool* keep, float scale,
    bool transpose, Buffer<float>& buffer) {
  const int64_t padded = (rows + PANEL_COLUMNS - 1) / PANEL_COLUMNS * PANEL_COLUMNS;
  const int64_t size = transpose ? columns * padded : rows * columns;
  float* const to = buffer.room(size);
  if (transpose && size > 0) std::memset(to, 0, size * sizeof(float));
  for (int64_t i = 0; i < rows; ++i)
    for_registers(columns, [&](int64_t j, int count) {
      Floats value = load(row_of<T>(from, i) + j, count) * scale;
      if (keep)
        for (int lane = 0; lane < count; ++lane)
          if (!keep[i * columns + j + lane]) value[lane] = 0;
      if (transpose)
        for (int lane = 0; lane < count; ++lane) to[(j + lane) * padded + i] = value[lane];
      else
        store(to + i * columns + j, value, count);
    });
  return {to, transpose ? padded : columns};
}

template <class T>
void contract(const Contraction& op) {
  Scratch& space = scratch();
  const auto C = masked<T>(op.C, op.rows, op.depth, op.keep_C, op.scale, false, space.a);
  const auto V = masked<T>(op.V, op.depth, op.columns, op.keep_V, 1, false, space.wide);
  product(op.rows, op.columns, op.depth, Operand<float>{C.data, C.row, 1}, V, Base<float>{},
      Rows<T>{row_of<T>(op.G, 0), op.G.row});
}

template <class T>
void contract_dC(const Contraction& op, Matrix dC) {
  Scratch& space = scratch();
  const auto dG = widen<T>(op.G, 0, op.rows, op.columns, space.gy);
  const auto Vt = masked<T>(op.V, op.depth, op.columns, op.keep_V, 1, true, space.wide);
  const Rows<float> all{space.narrow.room(op.rows * Vt.row), Vt.row};
  product(op.rows, Vt.row, op.columns, Operand<float>{dG.data, dG.row, 1}, Vt, Base<float>{}, all);
  const auto kept = masked<float>({all.data, all.row}, op.rows, op.depth, op.keep_C, op.scale, false, space.a);
  for (int64_t i = 0; i < op.rows; ++i)
    for_registers(op.depth,
        [&](int64_t j, int count) { store(row_of<T>(dC, i) + j, load(kept.data + i * kept.row + j, count), count); });
}

template <class T>
void contract_dV(const Contraction& op, int64_t begin, int64_t end, float* dV) {
  Scratch& space = scratch();
  const int64_t columns = end - begin;
  const auto C = masked<T>(op.C, op.rows, op.depth, op.keep_C, op.scale, false, space.a);
  const Matrix part{row_of<T>(op.G, 0) + begin, op.G.row, op.G.type};
  const auto dG = widen<T>(part, 0, op.rows, columns, space.gy);
  const Rows<float> all{space.wide.room(op.depth * columns), columns};
  product(op.depth, columns, op.rows, Operand<float>{C.data, 1, C.row}, dG, Base<float>{}, all);
  for (int64_t k = 0; k < op.depth; ++k)
    for (int64_t j = 0; j < columns; ++j)
      if (!op.keep_V || op.keep_V[k * op.columns + begin + j]) dV[k * columns + j] += all.data[k * columns + j];
}

template <class T>
void merge(Matrix W, const float* G, int64_t G_row, Matrix Dt, int64_t d_in, int64_t rank, int64_t begin, int64_t end) {
  product(end - begin, d_in, rank, Operand<float>{G + begin, 1, G_row},
      Rows<const float>{row_of<const float>(Dt, 0), Dt.row}, Base<T>{row_of<const T>(W, begin), W.row},
      Rows<T>{row_of<T>(W, begin), W.row});
}

inline void contract(const Contraction& op) {
  with_type(op.C.type, [&](auto c) { contract<decltype(c)>(op); });
}

inline void contract_dC(const Contraction& op, Matrix dC) {
  with_type(op.C.type, [&](auto c) { contract_dC<decltype(c)>(op, dC); });
}

inline void contract_dV(const Contraction& op, int64_t begin, int64_t end, float* dV) {
  with_type(op.C.type, [&](auto c) { contract_dV<decltype(c)>(op, begin, end, dV); });
}

inline void merge(
    Matrix W, const float* G, int64_t G_row, Matrix Dt, int64_t d_in, int64_t rank, int64_t begin, int64_t end) {
  with_type(W.type, [&](auto w) { merge<decltype(w)>(W, G, G_row, Dt, d_in, rank, begin, end); });
}

}  // namespace efft::EFFT_ISA
