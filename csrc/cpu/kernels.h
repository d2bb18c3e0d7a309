// Defines the interface between the torch binding (the files tt_*.cpp) and the CPU kernels. The interface depends
// neither on torch nor on instruction sets. It consists of plain structs of pointers, and of one table of functions for
// each instruction set in the library. The names of matrices and sizes are those of efft_kernels/ops, except that
// `rank` is called r1 there.
#pragma once

#include <cstdint>

namespace efft {

enum class Type : uint8_t { float32, bfloat16 };

// A matrix whose rows are contiguous; `row` is the distance between rows, in elements.
struct Matrix {
  void* data = nullptr;
  int64_t row = 0;
  Type type = Type::float32;
};

// A panel is a factor in the order in which a product reads it. Its elements are floats, with one exception: for
// products of bf16, if Kernels::pairs is set, the elements are bf16, and every two rows are interleaved. A panel is
// padded with columns of zeros to a multiple of PANEL_COLUMNS columns, so that products read only full registers.
constexpr int64_t PANEL_COLUMNS = 16;

// A strip is a group of STRIP_COLUMNS adjacent columns that is stored as a separate matrix, row after row. Matrices
// [rank, columns] are stored in strips, because a kernel reads or writes a few columns of all their rows at a time. If
// the rows were stored in one piece, this would touch too many pages of memory.
constexpr int64_t STRIP_COLUMNS = 48;

// The producer is the operation that runs directly before a layer and computes its input: a GELU or a layer norm. The
// producer's input is x (z for a GELU), and its output is a.
enum class Producer : uint8_t { none, gelu, gelu_tanh, norm };

// The fields that the forward and backward pass of a layer have in common.
struct LowRank {
  Producer producer = Producer::none;
  int64_t d_in = 0, d_out = 0, rank = 0, padded_rank = 0;
  Matrix x;                      // [tokens, d_in]; z for a GELU
  Matrix h;                      // [tokens, rank]
  const float* gamma = nullptr;  // [d_in], of a norm; null means ones
  const float* beta = nullptr;   // [d_in], of a norm; null means zeros
  float eps = 0;                 // of a norm, added to the variance
  float* mean = nullptr;         // [tokens], of a norm; the forward pass writes it, the backward pass reads it
  float* rstd = nullptr;         // [tokens], of a norm, 1 / sqrt(variance + eps); written and read like mean
  Matrix base;                   // the product with the frozen weight; it may share the memory of the result
};

// The part b + h G of the output of a layer that has not been added to the base product of the layer yet.
struct Pending {
  const float* b = nullptr;  // [d_out of the layer]; null means zeros
  Matrix h;                  // [tokens, rank]
  int64_t rank = 0;
  const void* G = nullptr;  // panel [rank, d_out of the layer], in strips; null if nothing is pending
};

// Computes h = a D and y = base + b + h G. Without a producer, a is x, and base is x W^T. With a producer, a is its
// output, and base is null; the caller then adds a W^T to y. If x is the output of a layer with a pending part, this
// part is first added to x, in place.
struct Forward : LowRank {
  Pending pending;           // of the layer whose output is x, in the type of y
  Matrix a;                  // [tokens, d_in], written if there is a producer
  Matrix y;                  // [tokens, d_out]; if data is null, only a and h are computed
  const float* b = nullptr;  // [d_out]; null means zeros
  const void* D = nullptr;   // panel [d_in, padded_rank]
  const void* G = nullptr;   // panel [rank, d_out], in strips
};

// Computes dh = gy G^T, the sums over tokens dD^T = dh^T a, dG = h^T gy and db (the sum of gy), and the gradient of a,
// da = base + dh D^T, where base is gy W. Without a producer, dx is da. With a producer, dx is computed from da by the
// backward pass of the producer. The gradients of a norm's parameters are also sums over tokens: dbeta is the sum of
// da, and dgamma is the sum of da (x - mean) rstd. Only the gradients that are needed are computed.
struct Backward : LowRank {
  Matrix gy;                 // [tokens, d_out]
  Matrix dx;                 // [tokens, d_in], in the type of x; data is null if dx is not needed
  const void* Gt = nullptr;  // panel [d_out, padded_rank]
  const void* Dt = nullptr;  // panel [rank, d_in], in strips
};

// The contributions of a range of tokens to the sums over all tokens. A pointer is null if the sum is not needed.
// dgamma and dbeta are either both null or both given.
struct Shares {
  float* dDt = nullptr;     // [rank, d_in], in strips
  float* dG = nullptr;      // [rank, d_out], in strips
  float* db = nullptr;      // [d_out]
  float* dgamma = nullptr;  // [d_in]
  float* dbeta = nullptr;   // [d_in]
};

// Computes G[i, :] = scale sum_k C[i, k] keep_C[i, k] V[k, :] keep_V[k, :] for one layer and core of a tensor train,
// where keep_C and keep_V are dropout masks.
struct Contraction {
  int64_t rows = 0, depth = 0, columns = 0;  // r1, r2, d_out
  Matrix C;                                  // [r1, r2]
  Matrix V;                                  // [r2, d_out]
  Matrix G;                                  // [r1, d_out]; dG in the backward pass
  const bool* keep_C = nullptr;              // [r1, r2], contiguous; null if no element is dropped
  const bool* keep_V = nullptr;              // [r2, d_out], contiguous; null if no element is dropped
  float scale = 1;
};

// Sets `to` to scale times the sum of n_parts matrices [rows, columns]. `from` is the first of these matrices, and each
// of the others begins `part` elements after the previous one. The result is transposed if `transpose` is set.
struct Gather {
  Matrix from;  // in strips if `row` is 0
  int64_t n_parts = 1, part = 0;
  int64_t rows = 0, columns = 0;
  float scale = 1;
  bool transpose = false;
  Matrix to;  // in strips if `row` is 0
};

// The functions for one instruction set. They have the names of their implementations: forward and backward are in
// low_rank.h, gather and interleave in gather.h, and the others in contract.h.
struct Kernels {
  const char* isa;
  bool pairs;  // whether products of bf16 need panels of interleaved bf16
  // forward and backward process tokens begin .. end - 1. backward overwrites the shares, so every thread must pass its
  // own shares.
  void (*forward)(const Forward&, int64_t begin, int64_t end);
  void (*backward)(const Backward&, int64_t begin, int64_t end, const Shares&);
  // Writes rows begin .. end - 1 (begin is even) of a float matrix [rows, columns] to `to`
  // [ceil(rows / 2), columns, 2], in bf16.
  void (*interleave)(const float* from, int64_t rows, int64_t columns, void* to, int64_t begin, int64_t end);
  // Processes columns begin .. end - 1 of `from`.
  void (*gather)(const Gather&, int64_t begin, int64_t end);
  void (*contract)(const Contraction&);
  void (*contract_dC)(const Contraction&, Matrix dC);
  // Adds columns begin .. end - 1 of the gradient for this layer and core to dV [r2, end - begin].
  void (*contract_dV)(const Contraction&, int64_t begin, int64_t end, float* dV);
  // Adds G[:, i]^T Dt to W[i, :] for rows i = begin .. end - 1. G_row is the distance between the rows of G.
  void (*merge)(
      Matrix W, const float* G, int64_t G_row, Matrix Dt, int64_t d_in, int64_t rank, int64_t begin, int64_t end);
};

// Returns the table of the best instruction set that this processor supports and EFFT_CPU_ISA allows. Throws
// std::runtime_error if EFFT_CPU_ISA names an unknown instruction set.
const Kernels& kernels();

}  // namespace efft
