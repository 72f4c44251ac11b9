/* The gradient by the filters of a convolution of stride 1 whose results are as large as its pictures, where the
processor multiplies matrices of bf16 (AMX): D[i, j] = sum over pixels p of g[p] x[p + (i, j)]^T.

Pictures (N, H, W, C) are laid out on a tape, pixel after pixel, `pad` pixels of zeros after each row and as many such
rows after each picture. So all neighbours p + (i, j) of a pixel are at the same distance, i (W + pad) + j, whatever the
row; where g is 0 any finite x will do. D is a product of matrices along the tape, which is cut into chunks.

The processor reads pairs of pixels, for which a distance may be odd: x is kept twice, in pairs from even pixels on and
from odd ones on. All matrices are SIDE x SIDE `pair`s or floats, one after another. */

#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

#if defined(MULTIPLIES_BF16) && defined(__AMX_BF16__)

#define SIDE 16
#define MATRIX (SIDE * SIDE)
#define CHUNK 1024 /* pixels: they are to stay in the cache next to the core, */
#define LEAST 128  /* and are to be worth the sums that are put away after them; */
#define PART 128   /* pairs that stay in the nearest cache while all neighbours are looked at */
#define STEP (2 * SIDE) /* that a product of two matrices sums over */

typedef unsigned int pair;
typedef struct { long across, down, pixels; } Tape; /* of one picture; of all */
typedef struct { unsigned char palette, start, none[14]; unsigned short bytes[16]; unsigned char rows[16]; } Config;

static long up(long a, long by) { return (a + by - 1) / by * by; }

/* Whether the system lets this process use its matrices; it wants to be asked. */
int limner_matrices(void) {
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
}

/* Where `count` pixels of the tape from `first` on stand; those of the edge, and after the end, at `nothing`, zeros. */
static void find(const number *pictures, Shape s, Tape t, long first, long count, const number *nothing,
                 const number **where) {
    long at = first + t.across * t.down, x = at % t.across, row = at / t.across; /* of a picture more, before all */
    long y = row % t.down, picture = row / t.down - 1;
    for (long n = 0; n < count; n++) {
        int inside = x < s.width && y < s.height && picture >= 0 && picture < s.pictures;
        where[n] = inside ? pictures + ((picture * s.height + y) * s.width + x) * s.channels : nothing;
        if (++x == t.across) x = 0, y++;
        if (y == t.down) y = 0, picture++;
    }
}

INLINE __m512i paired(const number *first, const number *second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)first)),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)second)), 16));
}

/* Rows become columns: of two rows `apart`, the one's right quarters and the other's left ones change places, first
halves of all, at last single pairs. */
INLINE void turn(__m512i *rows) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i second = _mm512_set1_epi32(SIDE); /* lanes from SIDE on are the second row's */
#pragma GCC unroll 4
    for (int apart = SIDE / 2; apart; apart /= 2) {
        __mmask16 right = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(apart));
        __m512i across = _mm512_xor_si512(lane, _mm512_set1_epi32(apart));
        __m512i upper = _mm512_mask_or_epi32(lane, right, across, second);
        __m512i under = _mm512_mask_or_epi32(across, right, lane, second);
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++)
            if (!(i & apart)) {
                __m512i a = rows[i], b = rows[i + apart];
                rows[i] = _mm512_permutex2var_epi32(a, upper, b);
                rows[i + apart] = _mm512_permutex2var_epi32(a, under, b);
            }
    }
}

/* Pairs of pixels from where[0] and from where[1] on, (channels / SIDE, pairs, SIDE) each. */
static void take(const number **where, long pairs, long channels, pair *even, pair *odd) {
    for (long n = 0; n < pairs; n++)
        for (long c = 0; c < channels; c += SIDE) {
            const number *a = where[2 * n] + c, *b = where[2 * n + 1] + c, *d = where[2 * n + 2] + c;
            _mm512_storeu_si512(even + c * pairs + n * SIDE, paired(a, b));
            _mm512_storeu_si512(odd + c * pairs + n * SIDE, paired(b, d));
        }
}

/* Pairs of the gradient's pixels as (channels / SIDE, pairs / SIDE) matrices with a row for each channel; adds what
they sum up to. */
static void take_turned(const number **where, long pairs, long channels, pair *to, float *sums) {
    for (long c = 0; c < channels; c += SIDE) {
        v sum = AT(sums, c);
        for (long n = 0; n < pairs; n += SIDE) {
            __m512i rows[SIDE];
            for (int i = 0; i < SIDE; i++) {
                const number **here = where + 2 * (n + i);
                rows[i] = paired(here[0] + c, here[1] + c);
                sum += get(here[0] + c) + get(here[1] + c);
            }
            turn(rows);
            for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(to + c * pairs + (n + i) * SIDE, rows[i]);
        }
        AT(sums, c) = sum;
    }
}

/* sums (2, 2) matrices, `under` floats from a row of them to the next, += x (2, pairs / SIDE) y (2, pairs, SIDE), or
the first alone of what isn't `tall` or `wide`. */
static void multiply(const pair *x, long x_row, const pair *y, long y_column, long pairs, int tall, int wide,
                     float *sums, long under) {
    const int line = SIDE * sizeof(pair);
    _tile_loadd(0, sums, line);
    if (wide) _tile_loadd(1, sums + MATRIX, line);
    if (tall) _tile_loadd(2, sums + under, line);
    if (tall && wide) _tile_loadd(3, sums + under + MATRIX, line);
    for (long n = 0; n < pairs * SIDE; n += MATRIX) {
        _tile_loadd(4, x + n, line);
        _tile_loadd(6, y + n, line);
        _tile_dpbf16ps(0, 4, 6);
        if (wide) {
            _tile_loadd(7, y + y_column + n, line);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (tall) {
            _tile_loadd(5, x + x_row + n, line);
            _tile_dpbf16ps(2, 5, 6);
            if (wide) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, line);
    if (wide) _tile_stored(1, sums + MATRIX, line);
    if (tall) _tile_stored(2, sums + under, line);
    if (tall && wide) _tile_stored(3, sums + under + MATRIX, line);
}

/* sums (side, side, O, C) in matrices += the chunk's products at every distance, part by part. */
static void add_products(const pair *asked, const pair *even, const pair *odd, long pairs, long seen, long ins,
                         long outs, long side, long across, float *sums) {
    for (long part = 0; part < pairs; part += PART)
        for (long o = 0; o < outs; o += 2 * SIDE)
            for (long c = 0; c < ins; c += 2 * SIDE)
                for (long k = 0; k < side * side; k++) {
                    long apart = k / side * across + k % side;
                    const pair *from = (apart % 2 ? odd : even) + c * seen + (part + apart / 2) * SIDE;
                    multiply(asked + o * pairs + part * SIDE, pairs * SIDE, from, seen * SIDE,
                             least(PART, pairs - part), outs - o > SIDE, ins - c > SIDE,
                             sums + (k * outs + o) * ins + c * SIDE, ins * SIDE);
                }
}

/* The gradients to (O, side, side, C) by the filters and sums (O) by the bias, from the pictures (N, H, W, C) and the
gradient (N, H, W, O) by the results; C and O are multiples of SIDE, side is 1 or 3. 0: done, 1: no memory left. */
int limner_filter_gradient(const number *pictures, const number *gradient, float *to, float *by_bias, Shape s, long outs,
                           long side) {
    long ins = s.channels, size = side * side * ins * outs, pad = side / 2;
    Shape result = {s.pictures, s.height, s.width, outs};
    Tape t = {s.width + pad, s.height + pad, s.pictures * (s.height + pad) * (s.width + pad)};
    long threads = omp_get_max_threads(), rounds = (t.pixels + CHUNK * threads - 1) / (CHUNK * threads);
    long chunk = up(t.pixels / (rounds * threads) + 1, STEP), before = pad * (t.across + 1);
    chunk = chunk < LEAST ? LEAST : chunk;
    long pairs = chunk / 2, seen = pairs + before + 1, workers = least(threads, (t.pixels + chunk - 1) / chunk);
    float *sums = aligned_alloc(64, sizeof(float) * workers * (size + outs));
    number *nothing = calloc((size_t)(ins + outs), sizeof(number));
    int failed = !sums || !nothing;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long worker = 0; worker < workers; worker++) {
            pair *asked = aligned_alloc(64, sizeof(pair) * (pairs * outs + 2 * seen * ins)), *even = asked + pairs * outs;
            const number **where = malloc(sizeof(*where) * 2 * (seen + 1));
            float *own = sums + worker * (size + outs);
            Config old, new = {.palette = 1};
            for (int m = 0; m < 8; m++) new.rows[m] = SIDE, new.bytes[m] = SIDE * sizeof(pair);
            if (!asked || !where) {
#pragma omp atomic write
                failed = 1;
            }
            _tile_storeconfig(&old); /* others may count on theirs */
            __asm__ volatile("" ::"r"(&new), "r"(&old) : "memory"); /* gcc 12 thinks that 8 bytes of each are meant */
            _tile_loadconfig(&new);
            if (sums) memset(own, 0, sizeof(float) * (size + outs));
            for (long from = worker * chunk; from < t.pixels && sums && nothing && asked && where;
                 from += workers * chunk) {
                find(gradient, result, t, from, chunk, nothing, where);
                take_turned(where, pairs, outs, asked, own + size);
                find(pictures, s, t, from - before, 2 * seen + 1, nothing, where);
                take(where, seen, ins, even, even + seen * ins);
                __asm__ volatile("" ::: "memory"); /* nor does it know what is read into the matrices */
                add_products(asked, even, even + seen * ins, pairs, seen, ins, outs, side, t.across, own);
            }
            _tile_loadconfig(&old);
            free(asked);
            free(where);
        }
#pragma omp for schedule(static)
        for (long o = 0; o < outs; o++)
            for (long at = 0; at < side * side * ins && !failed; at += SIDE) {
                long k = at / ins, c = at % ins;
                const float *from = sums + (k * outs + o / SIDE * SIDE) * ins + c * SIDE + o % SIDE * SIDE;
                v sum = {0};
                for (long w = 0; w < workers; w++) sum += AT(from, w * (size + outs));
                AT(to, o * side * side * ins + at) = sum;
            }
    }
    for (long o = 0; o < outs && !failed; o++) {
        by_bias[o] = 0;
        for (long w = 0; w < workers; w++) by_bias[o] += sums[w * (size + outs) + size + o];
    }
    free(sums);
    free(nothing);
    return failed;
}
#else
int limner_matrices(void) { return 0; }
int limner_filter_gradient(const void *x, const void *g, float *to, float *by_bias, long a[4], long o, long k) { return 1; }
#endif
