// Declares the interface between the torch binding (the files tt_*.cpp) and the CUDA kernels. The interface does not
// depend on torch. A plain struct of pointers, sizes and strides describes each operation. One function per operation
// launches its kernels on a stream. A few more functions tell the binding which part of the work the kernels of an
// operation will do.
//
// Terms that all files in this folder use:
// - tokens: the rows of the input of a layer.
// - factors: the matrices D and G. A layer adds the update h G with h = x D to the product with its frozen weight.
// - producer: the operation that runs directly before a layer and computes its input, a GELU or a layer norm.
// - tail: the rank-r product H T, which is added to the product of full size, A B.
// - sample: one entry of a batch in which every entry has its own factors. Without such a batch there is one sample.
// - splits: the ranges into which the tokens are divided, so that several blocks can sum over them in parallel.
// - second generation: the kernels for compute capability 9.0 that only EFFT_SM90_GENERATION=2 selects.
// - third generation: the second generation with another kernel for products, lowrank_gemm_pingpong_sm90.cu. Only
//   EFFT_SM90_GENERATION=3 selects it. "From the second generation on" includes the third generation.
//
// Matrices and sizes are named as in efft_kernels/triton/lowrank_gemm.py: Y = A B + bias + H T with H = A P. M is the
// number of tokens of a sample, and R is the rank. In the forward pass, K is d_in and N is d_out. In the backward pass,
// K is d_out and N is d_in.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace efft {

// Loads every kernel on the current GPU, unless an earlier call has done so. This must happen before any launch.
cudaError_t load_kernels();

// Returns false if EFFT_SM90_GENERATION has a value that selects no generation of kernels.
bool is_generation_known();

enum class Type : uint8_t { float32, bfloat16, float16 };

// A matrix, or a batch of matrices. The elements of a row are contiguous. Kernels copy 16 bytes at a time. Therefore
// every row starts at a multiple of 16 bytes, unless the comment of a field states that its rows need no alignment.
struct Matrix {
  void* data = nullptr;
  int64_t row = 0;     // distance between rows, in elements
  int64_t sample = 0;  // distance between samples, in elements
  Type type = Type::float32;
};

// A pointer to elements, which are contiguous unless the operation also has strides for them. A null pointer means that
// the tensor is absent.
struct Vector {
  const void* data = nullptr;
  Type type = Type::float32;
};

// The operation that runs directly before a layer and computes its input.
enum class Producer : uint8_t { none, gelu, gelu_tanh, norm };

// The parameters of a layer norm, and the statistics of the rows that it normalizes.
struct Norm {
  Vector gamma;           // [columns]; ones if absent
  Vector beta;            // [columns]; zeros if absent
  float* mean = nullptr;  // [rows]
  float* rstd = nullptr;  // [rows], 1 / sqrt(variance + eps)
  float eps = 0;          // added to the variance
};

// A GELU that lowrank_gemm applies to its result, element by element. There are two cases:
// - If z is null, Y is the input of the GELU, and `a` receives its output, the GELU of the rounded Y.
// - Otherwise, A B + H T is the gradient of the GELU's output, z is its input, and Y receives the gradient of z. If `a`
//   is not null, it receives the output of the GELU.
struct GeluOfProduct {
  Producer which = Producer::none;  // gelu or gelu_tanh; none if the product has no GELU
  Matrix z;                         // [M, N]
  Matrix a;                         // [M, N]
};

// Y = A B + bias + H T. If P is given, the same kernel also computes H = A P. P may be given only if
// lowrank_gemm_makes_h returns true for the operation. A GELU may be given only if lowrank_gemm_computes_gelu returns
// true.
struct LowRankGemm {
  int64_t samples = 1, M = 0, N = 0, K = 0, R = 0;
  Matrix A;                 // [samples, M, K]
  Matrix B;                 // [K, N], or [N, K] if transposed
  Matrix H;                 // [samples, M, R]; written if P is given, else read
  Matrix P;                 // [K, R], stored transposed as [R, K]; null if H has already been computed
  Matrix T;                 // [samples, R, N], or [samples, N, R] if transposed
  bool transposed = false;  // whether B and T are stored transposed
  Vector bias;              // [N]
  Matrix Y;                 // [samples, M, N]; rows need no alignment
  GeluOfProduct gelu;
};
// Returns whether P should be given: the kernel for `op` can compute H, and this is expected to be faster than a
// separate launch of `project`. P itself is not read and may still be absent.
bool lowrank_gemm_makes_h(const LowRankGemm& op);
// Returns whether the kernel for `op` can apply op.gelu. Only the third generation can.
bool lowrank_gemm_computes_gelu(const LowRankGemm& op);
cudaError_t lowrank_gemm(const LowRankGemm& op, cudaStream_t stream);

// H = A P.
struct Project {
  int64_t samples = 1, M = 0, K = 0, R = 0;
  Matrix A;  // [samples, M, K]
  Matrix P;  // [samples, K, R], stored transposed as [samples, R, K]
  Matrix H;  // [samples, M, R]
};
cudaError_t project(const Project& op, cudaStream_t stream);

// Describes the sums over all tokens in the backward pass of a layer: dG = h^T gy and dD = x^T dh. The sums are
// computed in float and written in the types factors_G and factors_D. From the second generation on, the
// launch also computes other sums, if they are needed:
// - db, the gradient of the bias, is the sum of gy.
// - dbeta and dgamma are the gradients of the parameters of a layer norm that runs directly before the layer. dbeta is
//   the sum of da, the gradient of the norm's output. dgamma is the sum of da (z - mean) rstd, where z is the input of
//   the norm.
struct ReduceTokens {
  int64_t tokens = 0, rank = 0;
  int64_t d_out = 0;   // 0 if dG is not needed
  int64_t d_in = 0;    // 0 if dD is not needed
  Matrix gy;           // [tokens, d_out], the gradient of the output of the layer
  Matrix h;            // [tokens, rank], x D
  Matrix x;            // [tokens, d_in], the input of the layer
  Matrix dh;           // [tokens, rank], gy G^T
  void* dG = nullptr;  // [rank, d_out], contiguous
  void* dD = nullptr;  // [d_in, rank], contiguous
  Type factors_G{};    // type of dG
  Type factors_D{};    // type of dD
  // These two are used only if reduce_tokens_finishes() is false.
  int64_t splits = 1;         // number of ranges of tokens, from reduce_tokens_splits
  float* partials = nullptr;  // [splits, rank * d_out + d_in * rank]

  int64_t summed_out = 0;  // number of columns of gy to sum; 0 if db is not needed
  float* db = nullptr;     // [summed_out]
  int64_t summed_in = 0;   // number of columns of da to sum; 0 if neither dgamma nor dbeta is needed
  Matrix da;               // [tokens, summed_in]
  Matrix z;                // [tokens, summed_in], in float32 or in the type of da; read only for dgamma
  Norm norm;               // mean and rstd are read for dgamma; the other fields are not used
  void* dgamma = nullptr;  // [summed_in]; null if not needed
  void* dbeta = nullptr;   // [summed_in]; null if not needed
  Type type_of_dgamma{};
  Type type_of_dbeta{};
};
// The sums of several layers. From the second generation on, one launch computes all of them.
struct Reductions {
  static constexpr int MOST = 2;
  ReduceTokens of[MOST];
  int count = 0;
};
// Returns whether reduce_tokens needs no memory for partial sums, and can compute db, dgamma and dbeta. This is the
// case from the second generation on.
bool reduce_tokens_finishes();
// Returns the number of ranges of tokens with which reduce_tokens fills the GPU. With few tokens, the number is
// smaller.
int64_t reduce_tokens_splits(const ReduceTokens& op);
cudaError_t reduce_tokens(const Reductions& all, cudaStream_t stream);

// out = producer(x).
struct Produce {
  int64_t rows = 0, columns = 0;
  Matrix x;    // [rows, columns], in float32 or in the type of out
  Matrix out;  // [rows, columns]
  Producer producer = Producer::none;
  Norm norm;  // used only for a layer norm; mean and rstd are written
};
cudaError_t produce(const Produce& op, cudaStream_t stream);

// Computes dx, the gradient of the producer's input, from dout, the gradient of its output. Also recomputes the output.
struct ProduceBackward {
  int64_t rows = 0, columns = 0;
  Matrix x;     // [rows, columns], in float32 or in `type`
  Matrix dout;  // [rows, columns], in `type`
  Matrix dx;    // [rows, columns], in any type; null if not needed. Rows need no alignment
  Matrix out;   // [rows, columns], in `type`; null if not needed
  Type type{};
  Producer producer = Producer::none;
  Norm norm;  // used only for a layer norm; mean and rstd are read
};
cudaError_t produce_backward(const ProduceBackward& op, cudaStream_t stream);

// Copies `from` to `to`, which may have another type and other strides. Each row of `to` has to.row elements. Those
// after the first `columns` elements are padding and are set to zero.
struct Pack {
  int64_t samples = 1, rows = 0, columns = 0;
  const void* from = nullptr;  // [samples, rows, columns], or [adapters, rows, columns] if `adapter` is given
  Type type{};                 // type of `from`
  int64_t from_sample = 0, from_row = 0, from_column = 0;  // strides of `from`, which may be any
  // [samples]: sample i of `to` receives matrix adapter[i] of `from`. If adapter[i] is negative, the sample receives
  // zeros. If adapter[i] is not less than `adapters`, it receives NaN. If the pointer is null, it receives matrix i.
  const int64_t* adapter = nullptr;
  int64_t adapters = 0;  // number of matrices in `from`, if `adapter` is given
  Matrix to;             // [samples, rows, to.row], contiguous
};
// Several copies that one launch performs.
struct Packs {
  static constexpr int MOST = 4;
  Pack of[MOST];
  int count = 0;
};
cudaError_t pack(const Packs& all, cudaStream_t stream);

// G[l] = scale [C[l, 0] V | C[l, 1] V | ...] for all layers l. C and V may have dropout masks, in which a byte of 0
// drops the element, that is, replaces it by zero. All tensors are contiguous.
struct Contraction {
  int64_t n_layers = 0, n_cores = 0, r1 = 0, r2 = 0, d_out = 0;
  Vector C;                         // [n_layers, n_cores, r1, r2]
  Vector V;                         // [r2, d_out]
  const uint8_t* keep_C = nullptr;  // mask in the shape of C; null if no element is dropped
  const uint8_t* keep_V = nullptr;  // mask [n_layers, r2, d_out]; null if no element is dropped
  float scale = 1;
};
// Writes G [n_layers, r1, n_cores * d_out] in the type of C.
cudaError_t contract(const Contraction& op, void* G, cudaStream_t stream);
// Writes dC and dV in one launch, in the shapes and types of C and V. A pointer is null if the gradient is not needed.
cudaError_t contract_backward(const Contraction& op, Vector dG, void* dC, void* dV, cudaStream_t stream);

// W += sign (D G)^T, computed in float and rounded once. The matrices may have any strides.
struct Merge {
  int64_t d_out = 0, d_in = 0, rank = 0;
  void* W = nullptr;  // [d_out, d_in]
  Type type{};        // type of W
  int64_t W_row = 0, W_column = 0;
  Vector D;  // [d_in, rank]
  int64_t D_row = 0, D_column = 0;
  Vector G;  // [rank, d_out]
  int64_t G_row = 0, G_column = 0;
  float sign = 1;
};
cudaError_t merge(const Merge& op, cudaStream_t stream);

}  // namespace efft
