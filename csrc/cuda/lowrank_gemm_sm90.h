// The same product by the instructions that only compute capability 9.0 has.
#pragma once

#include "kernels.h"

namespace efft {

// Most columns of H that the kernel makes itself, and most columns of Y for which that pays: measured on an H100, with
// more column tiles than these hold a pass of its own over A costs less than making H beside each of them.
constexpr int MADE_RANKS = 32, MADE_BESIDE = 2048;

// Whether the kernel makes H itself.
bool lowrank_gemm_sm90_makes_h(const LowRankGemm& op);
// Whether the kernel takes this product: 16-bit types throughout, one sample, and enough tiles for the GPU.
bool lowrank_gemm_sm90_takes(const LowRankGemm& op);
cudaError_t lowrank_gemm_sm90(const LowRankGemm& op, cudaStream_t stream);

}  // namespace efft
