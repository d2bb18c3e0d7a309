// Declares the second generation of reduce_tokens (see kernels.h), which EFFT_SM90_GENERATION=2 selects. Its blocks
// cooperate in clusters, which need compute capability 9.0.
#pragma once

#include "kernels.h"

namespace efft {

cudaError_t reduce_tokens_sm90(const Reductions& all, cudaStream_t stream);

}  // namespace efft
