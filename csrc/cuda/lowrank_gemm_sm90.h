// Declares the version of lowrank_gemm (see kernels.h) that uses instructions of compute capability 9.0.
#pragma once

#include "kernels.h"

namespace efft {

// The kernel can compute H itself if H has at most MADE_RANKS columns. The first generation of the kernel (the default)
// does so only if Y has at most MADE_BESIDE columns. For wider Y, computing H again for each column of tiles took
// longer on an H100 than computing H in a separate kernel. The other generations do so only if K is greater than 192.
constexpr int MADE_RANKS = 32, MADE_BESIDE = 2048;

// Returns whether the kernel should compute H itself, instead of a separate launch of `project`.
bool lowrank_gemm_sm90_makes_h(const LowRankGemm& op);
// Returns whether the kernel of the generation that the process uses can apply op.gelu. The kernel of the third
// generation can, if z and a have the type of the operands and rows of at least N elements.
bool lowrank_gemm_sm90_computes_gelu(const LowRankGemm& op);
// Returns whether the kernel can compute this product and has enough tiles to fill the GPU. The kernel needs a single
// sample, positive K and R, sizes below 2^31, the same 16-bit type for all operands and Y, an N that is a multiple of
// 8, and aligned rows of Y. The rows of an operand must not overlap.
bool lowrank_gemm_sm90_takes(const LowRankGemm& op);
// Launches the kernel of the generation that the process uses.
cudaError_t lowrank_gemm_sm90(const LowRankGemm& op, cudaStream_t stream);
// Launches the kernel of the third generation.
cudaError_t lowrank_gemm_pingpong_sm90(const LowRankGemm& op, cudaStream_t stream);

}  // namespace efft
