// The interface between the binding and the kernels, which knows neither torch nor instruction sets: plain pointers,
// and one table of functions per instruction set that the library was compiled for. Symbols as in efft_kernels/ops:
// tokens, d_in, d_out, rank (r1).
#pragma once

#include <cstdint>

namespace efft {

enum class Type : uint8_t { float32, bfloat16 };

// A matrix whose elements of a row are adjacent; `row` is the distance from row to row, in elements.
struct Matrix {
  void* data = nullptr;
  int64_t row = 0;
  Type type = Type::float32;
};

// A panel is a factor in the order in which a product reads it: floats, or bf16 with every two rows interleaved where
// Kernels::pairs says so. Its columns are padded with zeros to a multiple of this, so that no tile has a ragged edge.
constexpr int64_t PANEL_COLUMNS = 16;

// Matrices [rank, columns] are stored in strips of this many columns, in each of which the rows follow one another.
// Whole rows, read or written a few columns at a time, would touch too many pages.
constexpr int64_t STRIP_COLUMNS = 48;

// The function in front of the product: its input is x (z of a GELU), its output a.
enum class Producer : uint8_t { none, gelu, gelu_tanh, norm };

struct LowRank {
  Producer producer = Producer::none;
  int64_t d_in = 0, d_out = 0, rank = 0, padded_rank = 0;
  Matrix x;                      // [tokens, d_in]; z of a GELU
  Matrix h;                      // [tokens, rank]
  const float* gamma = nullptr;  // [d_in], of a norm; null for one
  const float* beta = nullptr;   // [d_in]; null for zero
  float eps = 0;
  float* mean = nullptr;  // [tokens]
  float* rstd = nullptr;  // [tokens]
  Matrix base;            // the base product, in the type of the result, which it may lie in
};

// h = a D and y = base + b + h G, where a is the output of the producer, or x without one. base: x W^T, or null where
// there is a producer; the caller then adds a W^T to y.
struct Forward : LowRank {
  Matrix a;                  // [tokens, d_in], written if there is a producer
  Matrix y;                  // [tokens, d_out]
  const float* b = nullptr;  // [d_out]; null for zero
  const void* D = nullptr;   // panel [d_in, padded_rank]
  const void* G = nullptr;   // panel [rank, d_out], in strips
};

// dh = gy G^T, dD^T = dh^T a, dG = h^T gy, db, the sum of gy, and the gradient of a, base + dh D^T, which goes through
// the producer, if there is one, to give dx. base: gy W. The parameters of a norm get sums of the gradient of a.
struct Backward : LowRank {
  Matrix gy;                 // [tokens, d_out]
  Matrix dx;                 // [tokens, d_in], in the type of x; data is null if it is not needed
  const void* Gt = nullptr;  // panel [d_out, padded_rank]
  const void* Dt = nullptr;  // panel [rank, d_in], in strips
};

// What a range of tokens contributes to each sum over all tokens; null if the sum is not needed. A norm's two sums go
// together.
struct Shares {
  float* dDt = nullptr;     // [rank, d_in], in strips
  float* dG = nullptr;      // [rank, d_out], in strips
  float* db = nullptr;      // [d_out]
  float* dgamma = nullptr;  // [d_in]
  float* dbeta = nullptr;   // [d_in]
};

// G[i, :] = sum_k C[i, k] keep_C[i, k] scale V[k, :] keep_V[k, :] for one layer and core.
struct Contraction {
  int64_t rows = 0, depth = 0, columns = 0;  // r1, r2, d_out
  Matrix C;                                  // [r1, r2]
  Matrix V;                                  // [r2, d_out]
  Matrix G;                                  // [r1, d_out]; dG in backward
  const bool* keep_C = nullptr;              // [r1, r2], contiguous
  const bool* keep_V = nullptr;              // [r2, d_out], contiguous
  float scale = 1;
};

// to = scale * the sum of n_parts matrices [rows, columns] that are `part` elements apart, transposed if `transpose`.
struct Gather {
  Matrix from;  // row 0: in strips
  int64_t n_parts = 1, part = 0;
  int64_t rows = 0, columns = 0;
  float scale = 1;
  bool transpose = false;
  Matrix to;  // row 0: in strips
};

// The functions are those of the same names: forward and backward in low_rank.h, gather and interleave in gather.h, the
// others in contract.h.
struct Kernels {
  const char* isa;
  bool pairs;  // products of bf16 take panels of interleaved bf16
  // For tokens begin .. end - 1. Every thread has its own shares, which are overwritten.
  void (*forward)(const Forward&, int64_t begin, int64_t end);
  void (*backward)(const Backward&, int64_t begin, int64_t end, const Shares&);
  // Writes rows begin .. end - 1 (begin is even) of floats [rows, columns] to `to` [ceil(rows / 2), columns, 2], in
  // bf16.
  void (*interleave)(const float* from, int64_t rows, int64_t columns, void* to, int64_t begin, int64_t end);
  // For columns begin .. end - 1 of `from`.
  void (*gather)(const Gather&, int64_t begin, int64_t end);
  void (*contract)(const Contraction&);
  void (*contract_dC)(const Contraction&, Matrix dC);
  // dV [r2, end - begin] += the columns begin .. end - 1 of this layer's and core's part.
  void (*contract_dV)(const Contraction&, int64_t begin, int64_t end, float* dV);
  // W[i, :] += G[:, i]^T Dt for rows begin .. end - 1.
  void (*merge)(
      Matrix W, const float* G, int64_t G_row, Matrix Dt, int64_t d_in, int64_t rank, int64_t begin, int64_t end);
};

// The table of the best instruction set that this processor has.
const Kernels& kernels();

}  // namespace efft
