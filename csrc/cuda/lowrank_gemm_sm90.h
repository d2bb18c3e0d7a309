// Declares lowrank_gemm with the instructions that only compute capability 9.0 has.
#pragma once

#include "kernels.h"

namespace efft {

// The largest number of columns of H that the kernel computes itself, and the largest number of columns of Y for which
// this is faster in the first generation. With more columns of Y, computing H next to every tile took longer on an H100
// than a separate pass over A.
constexpr int MADE_RANKS = 32, MADE_BESIDE = 2048;

// Returns whether the kernel should compute H itself.
bool lowrank_gemm_sm90_makes_h(const LowRankGemm& op);
// Returns whether the kernel can compute this product and has enough tiles to fill the GPU. It needs one sample, 16-bit
// types for all operands, and an N that is a multiple of 8.
bool lowrank_gemm_sm90_takes(const LowRankGemm& op);
// Launches the kernel of the generation that the process uses.
cudaError_t lowrank_gemm_sm90(const LowRankGemm& op, cudaStream_t stream);
// Launches the kernel of the third generation.
cudaError_t lowrank_gemm_pingpong_sm90(const LowRankGemm& op, cudaStream_t stream);

}  // namespace efft
