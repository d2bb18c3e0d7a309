// Defines the table of functions for one instruction set. efft_kernels/build.py compiles this file once per instruction
// set, with EFFT_ISA set to the name of the set and with the flags that build.py lists for it.
#include "kernels.h"

#include "contract.h"
#include "gather.h"
#include "low_rank.h"

namespace efft::EFFT_ISA {

#define EFFT_TEXT_OF(name) #name
#define EFFT_TEXT(name) EFFT_TEXT_OF(name)

extern const Kernels table;
const Kernels table{
    EFFT_TEXT(EFFT_ISA), PAIRS, forward, backward, interleave, gather, contract, contract_dC, contract_dV, merge};

}  // namespace efft::EFFT_ISA
