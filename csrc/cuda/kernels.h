// What the binding asks of the kernels, free of torch: plain structs of pointers, sizes and strides, one launcher each.
//
// Products are named as in efft_kernels/triton/lowrank_gemm.py: Y = A B + bias + H T with H = A P; M tokens, K and N
// the widths of the layer (d_in and d_out, or the reverse in backward), R the rank.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace efft {

// Loads every kernel on the current GPU, the first time that it is called there; before any launch.
cudaError_t load_kernels();

enum class Type : uint8_t { float32, bfloat16, float16 };

// Rows of unit stride that start at multiples of 16 bytes, so that 16 bytes can be copied at a time.
struct Matrix {
  void* data = nullptr;
  int64_t row = 0;     // elements from one row to the next
  int64_t sample = 0;  // elements from one sample to the next
  Type type = Type::float32;
};

// Elements side by side; null: absent.
struct Vector {
  const void* data = nullptr;
  Type type = Type::float32;
};

// What computes the input of a layer in front of it.
enum class Producer : uint8_t { none, gelu, gelu_tanh, norm };

struct Norm {
  Vector gamma;           // [K]; absent: one
  Vector beta;            // [K]; absent: zero
  float* mean = nullptr;  // [M]
  float* rstd = nullptr;  // [M]
  float eps = 0;
};

// Y = A B + bias + H T. With P, which lowrank_gemm_makes_h must allow, H is A P.
struct LowRankGemm {
  int64_t samples = 1, M = 0, N = 0, K = 0, R = 0;
  Matrix A;                 // [samples, M, K]
  Matrix B;                 // [K, N], or transposed [N, K]
  Matrix H;                 // [samples, M, R]; read, or with P written
  Matrix P;                 // [R, K]; null: H is there
  Matrix T;                 // [samples, R, N], or transposed [samples, N, R]
  bool transposed = false;  // B and T
  Vector bias;              // [N]
  Matrix Y;                 // [samples, M, N]; rows need no alignment
};
bool lowrank_gemm_makes_h(const LowRankGemm& op);
cudaError_t lowrank_gemm(const LowRankGemm& op, cudaStream_t stream);

// H = A P.
struct Project {
  int64_t samples = 1, M = 0, K = 0, R = 0;
  Matrix A;  // [samples, M, K]
  Matrix P;  // [samples, R, K]
  Matrix H;  // [samples, M, R]
};
cudaError_t project(const Project& op, cudaStream_t stream);

// dG = h^T gy and dD = x^T dh in float, each over all tokens. In the second generation also, over all tokens, the sums
// of gy and, behind a norm, of da and da n, where n is the normalized z.
struct ReduceTokens {
  int64_t tokens = 0, rank = 0;
  int64_t d_out = 0;          // 0: no dG
  int64_t d_in = 0;           // 0: no dD
  Matrix gy;                  // [tokens, d_out]
  Matrix h;                   // [tokens, rank]
  Matrix x;                   // [tokens, d_in]
  Matrix dh;                  // [tokens, rank]
  void* dG = nullptr;         // [rank, d_out], contiguous
  void* dD = nullptr;         // [d_in, rank], contiguous
  Type factors_G{};           // type of dG
  Type factors_D{};           // type of dD
  int64_t splits = 1;         // ranges of tokens; reduce_tokens_splits(op) fill the GPU
  float* partials = nullptr;  // [splits, rank * d_out + d_in * rank]; null if reduce_tokens_finishes()

  int64_t summed_out = 0;  // columns of gy; 0: no db
  float* db = nullptr;     // [summed_out]
  int64_t summed_in = 0;   // columns of da; 0: neither dgamma nor dbeta
  Matrix da;               // [tokens, summed_in]
  Matrix z;                // [tokens, summed_in], in float32 or in the type of da; read for dgamma
  Norm norm;               // its mean and rstd are read for dgamma
  void* dgamma = nullptr;  // [summed_in]; null: not wanted
  void* dbeta = nullptr;   // [summed_in]; null: not wanted
  Type type_of_dgamma{};
  Type type_of_dbeta{};
};
// Whether reduce_tokens adds its ranges of tokens itself and computes the sums db, dgamma and dbeta.
bool reduce_tokens_finishes();
int64_t reduce_tokens_splits(const ReduceTokens& op);
cudaError_t reduce_tokens(const ReduceTokens& op, cudaStream_t stream);

// out = producer(x).
struct Produce {
  int64_t rows = 0, columns = 0;
  Matrix x;    // [rows, columns], in float32 or in the type of out
  Matrix out;  // [rows, columns]
  Producer producer = Producer::none;
  Norm norm;  // its mean and rstd are written
};
cudaError_t produce(const Produce& op, cudaStream_t stream);

// dx from dout, the gradient of what the producer put out, and that again.
struct ProduceBackward {
  int64_t rows = 0, columns = 0;
  Matrix x;     // [rows, columns], in float32 or in `type`
  Matrix dout;  // [rows, columns], in `type`
  Matrix dx;    // [rows, columns], of any type; null: not wanted. Rows need no alignment
  Matrix out;   // [rows, columns], in `type`; null: not wanted
  Type type{};
  Producer producer = Producer::none;
  Norm norm;  // its mean and rstd are read
};
cudaError_t produce_backward(const ProduceBackward& op, cudaStream_t stream);

// to = from in another type, order or alignment; what lies between columns and to.row becomes zero.
struct Pack {
  int64_t samples = 1, rows = 0, columns = 0;
  const void* from = nullptr;  // [samples, rows, columns] of any strides
  Type type{};
  int64_t from_sample = 0, from_row = 0, from_column = 0;
  const int64_t* adapter = nullptr;  // [samples]: which of from's samples to take, negative: zeros; null: each its own
  int64_t adapters = 0;              // how many from has; an index of as many or more: NaN
  Matrix to;                         // [samples, rows, to.row], contiguous
};
// Several, in one launch.
struct Packs {
  static constexpr int MOST = 4;
  Pack of[MOST];
  int count = 0;
};
cudaError_t pack(const Packs& all, cudaStream_t stream);

// G[l] = scale [C[l, 0] V | C[l, 1] V | ...] for all layers; masks are bytes, 0 drops an element. All contiguous.
struct Contraction {
  int64_t n_layers = 0, n_cores = 0, r1 = 0, r2 = 0, d_out = 0;
  Vector C;                         // [n_layers, n_cores, r1, r2]
  Vector V;                         // [r2, d_out]
  const uint8_t* keep_C = nullptr;  // like C; null: all
  const uint8_t* keep_V = nullptr;  // [n_layers, r2, d_out]; null: all
  float scale = 1;
};
cudaError_t contract(const Contraction& op, void* G, cudaStream_t stream);  // G [n_layers, r1, n_cores * d_out], like C
// dC like C and dV like V, in one launch; null: not wanted.
cudaError_t contract_backward(const Contraction& op, Vector dG, void* dC, void* dV, cudaStream_t stream);

// W + sign (D G)^T in float, rounded once. All of any strides.
struct Merge {
  int64_t d_out = 0, d_in = 0, rank = 0;
  void* W = nullptr;  // [d_out, d_in]
  Type type{};
  int64_t W_row = 0, W_column = 0;
  Vector D;  // [d_in, rank]
  int64_t D_row = 0, D_column = 0;
  Vector G;  // [rank, d_out]
  int64_t G_row = 0, G_column = 0;
  float sign = 1;
};
cudaError_t merge(const Merge& op, cudaStream_t stream);

}  // namespace efft
