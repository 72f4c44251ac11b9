/* Vectors of floats as wide as the processor's. Whatever they are read from and written to need not be aligned. */

#ifdef __AVX512F__
#define WIDTH 16 /* channels in one vector */
#else
#define WIDTH 8
#endif

typedef float v __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int whole __attribute__((vector_size(4 * WIDTH), aligned(4)));

#define AT(base, offset) (*(v *)((base) + (offset)))
#define INLINE static inline __attribute__((always_inline))
