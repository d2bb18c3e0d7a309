// Defines tiles in shared memory, a function that fills a tile by asynchronous copies of 16 bytes, and functions that
// read and write elements of any type.
#pragma once

#include "instructions.cuh"
#include "kernels.h"

namespace efft {

// A tile [ROWS, COLUMNS], stored in chunks of 16 bytes. The chunks of each row are permuted, depending on the number of
// the row. A matrix load (load_matrices) reads one chunk from each of eight rows, all at the same columns. Because of
// the permutation, these chunks are in different banks.
template <class T, int ROWS, int COLUMNS>
struct Tile {
  static constexpr int PER_CHUNK = 16 / sizeof(T);
  static constexpr int CHUNKS = COLUMNS / PER_CHUNK;
  static constexpr int BYTES = ROWS * COLUMNS * static_cast<int>(sizeof(T));
  static constexpr int ROWS_A_LINE = CHUNKS < 8 ? 8 / CHUNKS : 1;  // number of rows that together cover all 32 banks
  static_assert(CHUNKS * PER_CHUNK == COLUMNS && (CHUNKS & (CHUNKS - 1)) == 0, "rows of 2^n chunks");

  T* data;

  __device__ T* chunk(int row, int c) const {
    const int shuffled = c ^ (row / ROWS_A_LINE & (CHUNKS < 8 ? CHUNKS - 1 : 7));
    return data + (row * CHUNKS + shuffled) * PER_CHUNK;
  }
  __device__ T& at(int row, int column) const { return chunk(row, column / PER_CHUNK)[column % PER_CHUNK]; }
};

// A matrix [rows, columns] from which tiles are read. `row` is the distance between rows, in elements.
template <class T>
struct Source {
  const T* data;
  int64_t row;
  int64_t rows, columns;
};

template <class T>
__device__ Source<T> source(const Matrix& of, int64_t sample, int64_t rows, int64_t columns) {
  return {static_cast<const T*>(of.data) + sample * of.sample, of.row, rows, columns};
}

// Starts to copy the part of `from` that begins at (row, column) to `tile`. Elements outside of the matrix become zero.
// All THREADS threads of the block must call this function. The rows of `from` must start at multiples of 16 bytes, and
// `column` must be a multiple of PER_CHUNK.
template <int THREADS, class T, int ROWS, int COLUMNS>
__device__ void fetch(const Tile<T, ROWS, COLUMNS>& tile, const Source<T>& from, int64_t row, int64_t column) {
  constexpr int PER_CHUNK = Tile<T, ROWS, COLUMNS>::PER_CHUNK, CHUNKS = Tile<T, ROWS, COLUMNS>::CHUNKS;
  constexpr int ALL = ROWS * CHUNKS;
#pragma unroll
  for (int i = 0; i < ALL; i += THREADS) {
    const int chunk = i + static_cast<int>(threadIdx.x);
    if (ALL % THREADS != 0 && chunk >= ALL) break;
    const int r = chunk / CHUNKS, c = chunk % CHUNKS;
    const int64_t at = column + c * PER_CHUNK, left = from.columns - at;
    int exist = row + r < from.rows && left > 0 ? (left < PER_CHUNK ? static_cast<int>(left) : PER_CHUNK) : 0;
    const T* address = exist ? from.data + (row + r) * from.row + at : from.data;
    copy_async(tile.chunk(r, c), address, exist * static_cast<int>(sizeof(T)));
  }
}

// The functions `read` and `write` access one element of a matrix whose type is known only at run time.
__device__ inline float read(const Vector& from, int64_t at) {
  if (from.type == Type::float32) return static_cast<const float*>(from.data)[at];
  if (from.type == Type::bfloat16) return widen(static_cast<const bf16*>(from.data)[at]);
  return widen(static_cast<const fp16*>(from.data)[at]);
}

__device__ inline void write(void* to, Type type, int64_t at, float value) {
  if (type == Type::float32)
    static_cast<float*>(to)[at] = value;
  else if (type == Type::bfloat16)
    static_cast<bf16*>(to)[at] = narrow<bf16>(value);
  else
    static_cast<fp16*>(to)[at] = narrow<fp16>(value);
}

// Two adjacent elements, of which the first is at an even position, so that one store can write both.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

__device__ inline void write_pair(void* to, Type type, int64_t at, float first, float second) {
  if (type == Type::float32)
    static_cast<Pair<float>*>(to)[at / 2] = {first, second};
  else if (type == Type::bfloat16)
    static_cast<Pair<bf16>*>(to)[at / 2] = {narrow<bf16>(first), narrow<bf16>(second)};
  else
    static_cast<Pair<fp16>*>(to)[at / 2] = {narrow<fp16>(first), narrow<fp16>(second)};
}

}  // namespace efft
