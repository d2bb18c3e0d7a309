// The same product by the instructions that only compute capability 9.0 has. Built where CUTLASS's headers are.
#pragma once

#include "kernels.h"

namespace efft {

// Whether the kernel takes this product: 16-bit types throughout, one sample, and enough tiles for the GPU.
bool lowrank_gemm_sm90_takes(const LowRankGemm& op);
cudaError_t lowrank_gemm_sm90(const LowRankGemm& op, cudaStream_t stream);

}  // namespace efft
