/* Vectors of floats as wide as the processor's. Whatever they are read from and written to need not be aligned. */

#if defined(BF16) && defined(__AVX512BF16__)
#define MULTIPLIES_BF16
#endif

#ifdef __AVX512F__
#include <immintrin.h>
#define WIDTH 16 /* channels in one vector */
#else
#define WIDTH 8
#endif

typedef float v __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int whole __attribute__((vector_size(4 * WIDTH), aligned(4)));

#define AT(base, offset) (*(v *)((base) + (offset)))
#define INLINE static inline __attribute__((always_inline))

typedef struct { long pictures, height, width, channels; } Shape;

INLINE long least(long a, long b) { return a < b ? a : b; }

/* What pictures are kept in. They become floats where they are read. */
#ifdef BF16
typedef unsigned short number; /* the upper half of a float */
typedef unsigned short numbers __attribute__((vector_size(2 * WIDTH), aligned(2)));
typedef unsigned int bits __attribute__((vector_size(4 * WIDTH), aligned(4)));

/* To the nearest, halves to even; what isn't a number stays so. The processor's own way makes 0 of less than 1e-38. */
INLINE numbers rounded(v x) {
#ifdef MULTIPLIES_BF16
    return (numbers)_mm512_cvtneps_pbh((__m512)x);
#else
    bits all = (bits)x, near = (all + 0x7fff + (all >> 16 & 1)) >> 16, real = (bits)(x == x);
    return __builtin_convertvector((near & real) | (0x7fc0 & ~real), numbers);
#endif
}

INLINE v get(const number *from) { return (v)(__builtin_convertvector(*(const numbers *)from, bits) << 16); }

INLINE void set(number *to, v x) { *(numbers *)to = rounded(x); }
#else
typedef float number;

INLINE v get(const number *from) { return *(const v *)from; }
INLINE void set(number *to, v x) { *(v *)to = x; }
#endif
