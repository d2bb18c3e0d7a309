// Declares the second generation of reduce_tokens and of reduce_tokens_splits (see kernels.h), which
// EFFT_SM90_GENERATION=2 selects. Its blocks cooperate in clusters, which need compute capability 9.0.
#pragma once

#include "kernels.h"

namespace efft {

int64_t reduce_tokens_splits_sm90(const ReduceTokens& op);
cudaError_t reduce_tokens_sm90(const ReduceTokens& op, cudaStream_t stream);

}  // namespace efft
