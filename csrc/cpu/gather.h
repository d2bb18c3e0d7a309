// Copies small matrices and converts their type and memory layout. `gather` reads and writes matrices that are stored
// in rows or in strips (see kernels.h). It can also transpose and scale a matrix, and add several matrices. The binding
// uses `gather` to create panels of factors and to add the partial sums of the threads. `interleave` converts a panel
// to bf16 with every two rows interleaved.
#pragma once

#include "low_rank.h"

namespace efft::EFFT_ISA {

// Returns a pointer to element (i, j) of a matrix [rows, ...], which is stored in rows or in strips. The elements that
// follow it in its row are contiguous as far as its strip extends. `gather` uses only multiples of 16 for j. Because
// the width of a strip is a multiple of 16, the 16 elements from j on are then contiguous.
template <class T>
T* place(const Matrix& matrix, int64_t rows, int64_t i, int64_t j) {
  if (matrix.row != 0) return row_of<T>(matrix, i) + j;
  return static_cast<T*>(matrix.data) + (j / STRIP_COLUMNS * rows + i) * STRIP_COLUMNS + j % STRIP_COLUMNS;
}

// Implements Kernels::gather. It copies squares of 16 x 16 elements, so that the rows that are read and the rows that
// are written stay in the first-level cache.
template <class From, class To>
void gather(const Gather& op, int64_t begin, int64_t end) {
  constexpr int64_t SIDE = 16;
  static_assert(STRIP_COLUMNS % SIDE == 0);
  float square[SIDE][SIDE];
  for (int64_t i = 0; i < op.rows; i += SIDE)
    for (int64_t j = begin; j < end; j += SIDE) {
      const int64_t rows = std::min(SIDE, op.rows - i), columns = std::min(SIDE, end - j);
      for (int64_t k = 0; k < rows; ++k) {
        const From* from = place<const From>(op.from, op.rows, i + k, j);
        for_registers(columns, [&](int64_t at, int count) {
          Floats total = load(from + at, count);
          for (int64_t part = 1; part < op.n_parts; ++part) total += load(from + part * op.part + at, count);
          store(square[k] + at, total * op.scale, count);
        });
      }
      if (op.transpose) {
        float turned[SIDE][SIDE];
        for (int64_t k = 0; k < columns; ++k)
          for (int64_t l = 0; l < SIDE; ++l) turned[k][l] = square[l][k];
        for (int64_t k = 0; k < columns; ++k) {
          To* to = place<To>(op.to, op.columns, j + k, i);
          for_registers(rows, [&](int64_t at, int count) { store(to + at, load(turned[k] + at, count), count); });
        }
      } else {
        for (int64_t k = 0; k < rows; ++k) {
          To* to = place<To>(op.to, op.rows, i + k, j);
          for_registers(columns, [&](int64_t at, int count) { store(to + at, load(square[k] + at, count), count); });
        }
      }
    }
}

inline void gather(const Gather& op, int64_t begin, int64_t end) {
  with_type(op.from.type, [&](auto from) {
    with_type(op.to.type, [&](auto to) { gather<decltype(from), decltype(to)>(op, begin, end); });
  });
}

// Implements Kernels::interleave.
inline void interleave(const float* from, int64_t rows, int64_t columns, void* to, int64_t begin, int64_t end) {
  interleave(Rows<const float>{from + begin * columns, columns}, std::min(end, rows) - begin, columns, columns,
      static_cast<bf16*>(to) + begin * columns);
}

}  // namespace efft::EFFT_ISA
