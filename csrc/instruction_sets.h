// Several bodies of one function, one per instruction set, picked when the library is loaded:
// PROGTUNING_CLONES lets the compiler make them, PROGTUNING_VERSIONS says that they can be written.
#pragma once

#include <cstdint>  // defines __GLIBC__

// Needs ifunc, hence glibc. The levels of x86-64 ask the processor for features, where a name such
// as haswell would ask for its maker; compilers before GCC 12 do not know them, and avx512f alone
// lacks the 16-bit arithmetic. No level changes a bit: nothing is contracted (setup.py).
#if !defined(__x86_64__) || !defined(__GLIBC__) || !defined(__GNUC__) || defined(__clang__) || \
    defined(PROGTUNING_ONE_ISA)
#define PROGTUNING_CLONES
#elif __GNUC__ >= 12
#define PROGTUNING_VERSIONS
#define PROGTUNING_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PROGTUNING_VERSIONS
#define PROGTUNING_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
