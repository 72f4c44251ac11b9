/* 3x3 convolutions of stride 1 with padding 1 by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2015,
1509.09308): y = A^T [(G g G^T) . (B^T d B)] A for each tile y of 4x4 pixels and the 6x6 pixels d that it depends on.
The polynomials behind it are taken at 0, +-P, +-Q and infinity. By 2/3 and 3/2 half as much is rounded away as by the
usual 1 and 2.

Pictures are (N, H, W, C) of `number`, what lies outside of one is zero. The 36 numbers of a tile, or of a filter, come
first: tiles (36, T, C), filters (36, C, O). C and O are multiples of WIDTH. They are kept as `unit`s: a float each, or
under bf16, where the processor multiplies it, a pair of bf16 numbers, neighbours in the dimension that is summed over.
In panels, such a matrix (R, C) is cut into (R, PANEL), one after another, the last of which may be narrower: read that
way, its rows don't push each other out of the cache. Sums are float. */

#include <omp.h>
#include <stdlib.h>

#include "vectors.h"

#define ROWS (WIDTH / 2) /* of a product of matrices that are worked out together, as many as there are registers for */
#define PANEL (2 * WIDTH)
#define BLOCK 48 /* tiles in work at a time: they are to stay in the cache next to the core */
#define FEW 24 /* the same, where sums over tiles are to stay there as well; */
#define MANY 96 /* and where these are too many for that; all three are whole pairs */
#define SUMS (36L * 96 * 96) /* as many still stay there */
#define MOST (1L << 28) /* numbers in the sums of all workers together */

#define P (2.0f / 3)
#define Q (3.0f / 2)

#ifdef MULTIPLIES_BF16
#define PAIR 2 /* numbers in a unit */
typedef unsigned int unit;

INLINE void side_by_side(unit *to, v x) { set((number *)to, x); }
INLINE void in_pairs(unit *to, v first, v second) {
    *(bits *)to = __builtin_convertvector(rounded(first), bits) | __builtin_convertvector(rounded(second), bits) << 16;
}
INLINE v plus_product(v sum, unit x, const unit *y) {
    return (v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)_mm512_loadu_si512(y));
}
#else
#define PAIR 1
typedef float unit;

INLINE void side_by_side(unit *to, v x) { AT(to, 0) = x; }
INLINE void in_pairs(unit *to, v x, v none) { AT(to, 0) = x; }
INLINE v plus_product(v sum, unit x, const unit *y) { return sum + x * AT(y, 0); }
#endif

typedef struct { long across, down, count; } Tiles;


static Tiles tiles_of(Shape s) {
    Tiles t = {(s.width + 3) / 4, (s.height + 3) / 4, 0};
    t.count = s.pictures * t.down * t.across;
    return t;
}

/* Where row and column of a matrix (rows, columns) stand that lies in panels. */
INLINE long in_panels(long row, long column, long rows, long columns) {
    long start = column / PANEL * PANEL;
    return start * rows + row * least(PANEL, columns - start) + column - start;
}

/* --- the transforms of one dimension: `from` and `to` are `step` and `apart` vectors apart ---------------------- */

INLINE void b_t(const v *from, int step, v *to, int apart) { /* B^T d */
    v d0 = from[0], d1 = from[step], d2 = from[2 * step], d3 = from[3 * step], d4 = from[4 * step], d5 = from[5 * step];
    v p = d4 - Q * Q * d2, q = P * d3 - Q * d1, r = d4 - P * P * d2, t = Q * d3 - P * d1;
    to[0] = d0 - (P * P + Q * Q) * d2 + d4;
    to[apart] = p + q;
    to[2 * apart] = p - q;
    to[3 * apart] = r + t;
    to[4 * apart] = r - t;
    to[5 * apart] = d1 - (P * P + Q * Q) * d3 + d5;
}

INLINE void a_t(const v *from, int step, v *to, int apart) { /* A^T m */
    v p = from[step] + from[2 * step], q = from[step] - from[2 * step];
    v r = from[3 * step] + from[4 * step], t = from[3 * step] - from[4 * step];
    to[0] = from[0] + p + r;
    to[apart] = P * q + Q * t;
    to[2 * apart] = P * P * p + Q * Q * r;
    to[3 * apart] = P * P * P * q + Q * Q * Q * t + from[5 * step];
}

INLINE void a(const v *from, int step, v *to, int apart) { /* A y, the adjoint of the last */
    v y0 = from[0], y1 = from[step], y2 = from[2 * step], y3 = from[3 * step];
    v p = y0 + P * P * y2, q = P * y1 + P * P * P * y3, r = y0 + Q * Q * y2, t = Q * y1 + Q * Q * Q * y3;
    to[0] = y0;
    to[apart] = p + q;
    to[2 * apart] = p - q;
    to[3 * apart] = r + t;
    to[4 * apart] = r - t;
    to[5 * apart] = y3;
}

#define AT_P (1 / (2 * P * P * (P * P - Q * Q))) /* 1 / the derivative of x (x^2 - P^2) (x^2 - Q^2) */
#define AT_Q (1 / (2 * Q * Q * (Q * Q - P * P)))

INLINE void g(const v *from, int step, v *to, int apart) { /* G g */
    v g0 = from[0], g1 = from[step], g2 = from[2 * step];
    v p = AT_P * g0 + AT_P * P * P * g2, q = AT_P * P * g1, r = AT_Q * g0 + AT_Q * Q * Q * g2, t = AT_Q * Q * g1;
    to[0] = g0;
    to[apart] = p + q;
    to[2 * apart] = p - q;
    to[3 * apart] = r + t;
    to[4 * apart] = r - t;
    to[5 * apart] = g2;
}

INLINE void g_t(const v *from, int step, v *to, int apart) { /* G^T u */
    v p = from[step] + from[2 * step], q = from[step] - from[2 * step];
    v r = from[3 * step] + from[4 * step], t = from[3 * step] - from[4 * step];
    to[0] = from[0] + AT_P * p + AT_Q * r;
    to[apart] = AT_P * P * q + AT_Q * Q * t;
    to[2 * apart] = AT_P * P * P * p + AT_Q * Q * Q * r + from[5 * step];
}

/* --- tiles of a picture ----------------------------------------------------------------------------------------- */

/* Where the pixels of a picture's tile stand, 6x6 of them, or 4x4 of a gradient's; those outside, and all of a tile
after the last one, at `nothing`, a row of zeros. */
INLINE void find(const number *picture, Shape s, long tile, int of_output, const number *nothing,
                 const number **where) {
    Tiles t = tiles_of(s);
    long from = tile / (t.down * t.across) * s.height, size = of_output ? 4 : 6, edge = !of_output;
    long top = tile / t.across % t.down * 4 - edge, left = tile % t.across * 4 - edge;
    for (long y = top; y < top + size; y++)
        for (long x = left; x < left + size; x++) {
            int inside = tile < t.count && y >= 0 && y < s.height && x >= 0 && x < s.width;
            *where++ = inside ? picture + ((from + y) * s.width + x) * s.channels : nothing;
        }
}

/* B^T d B of WIDTH channels of a tile, or A y A^T of a gradient's. */
INLINE void transform(const number **where, long channel, int of_output, v *to) {
    int size = of_output ? 4 : 6;
    v pixels[6], half[36];
    for (int j = 0; j < size; j++) {
        for (int i = 0; i < size; i++) pixels[i] = get(where[i * size + j] + channel);
        if (of_output) a(pixels, 1, half + j, 4);
        else b_t(pixels, 1, half + j, 6);
    }
    for (int i = 0; i < 6; i++)
        if (of_output) a(half + 4 * i, 1, to + 6 * i, 1);
        else b_t(half + 6 * i, 1, to + 6 * i, 1);
}

/* The picture's tiles from `first` on into (36, rows, C), pairs being neighbours among the channels. */
INLINE void take(const number *picture, Shape s, long first, long rows, const number *nothing, unit *to) {
    for (long row = 0; row < rows; row++) {
        const number *where[36];
        find(picture, s, first + row, 0, nothing, where);
        for (long c = 0; c < s.channels; c += WIDTH) {
            v tile[36];
            transform(where, c, 0, tile);
            for (int k = 0; k < 36; k++) side_by_side(to + ((k * rows + row) * s.channels + c) / PAIR, tile[k]);
        }
    }
}

/* Tiles of a picture or of a gradient into (36, rows, C) in panels, pairs being neighbours among the tiles. */
INLINE void take_in_panels(const number *picture, Shape s, long first, long rows, int of_output, const number *nothing,
                           unit *to) {
    for (long row = 0; row < rows / PAIR; row++) {
        const number *where[2][36];
        for (int one = 0; one < PAIR; one++)
            find(picture, s, first + row * PAIR + one, of_output, nothing, where[one]);
        for (long c = 0; c < s.channels; c += WIDTH) {
            v tiles[2][36];
            for (int one = 0; one < PAIR; one++) transform(where[one], c, of_output, tiles[one]);
            unit *out = to + in_panels(row, c, rows / PAIR, s.channels);
            for (int k = 0; k < 36; k++)
                in_pairs(out + k * (rows / PAIR) * s.channels, tiles[0][k], tiles[PAIR - 1][k]);
        }
    }
}

/* A^T m A + bias + residual of `wide` channels of a block of tiles (36, BLOCK, PANEL), into the picture; the biases of
one picture and the next are `step` apart. */
INLINE void put(const float *tiles, const float *bias, long step, const number *residual, number *picture, Shape s,
                long first, long last, int wide) {
    Tiles t = tiles_of(s);
    for (long tile = first; tile < last; tile++) {
        long number_of = tile / (t.down * t.across), start = number_of * s.height * s.width * s.channels;
        long top = tile / t.across % t.down * 4, left = tile % t.across * 4;
        for (int c = 0; c < wide; c += WIDTH) {
            const v *m = (const v *)(tiles + (tile - first) * PANEL + c);
            v half[24], y[16], b = bias ? AT(bias, number_of * step + c) : (v){0};
            for (int j = 0; j < 6; j++) a_t(m + j * BLOCK * PANEL / WIDTH, 6 * BLOCK * PANEL / WIDTH, half + j, 6);
            for (int i = 0; i < 4; i++) a_t(half + 6 * i, 1, y + 4 * i, 1);
            for (int i = 0; i < 4 && top + i < s.height; i++)
                for (int j = 0; j < 4 && left + j < s.width; j++) {
                    long here = start + ((top + i) * s.width + left + j) * s.channels + c;
                    set(picture + here, y[i * 4 + j] + b + (residual ? get(residual + here) : (v){0}));
                }
        }
    }
}

/* --- products of matrices --------------------------------------------------------------------------------------- */

/* to[i][j] (+)= sum over units n of x[i, n] y[n, j] for ROWS i and `vectors` * WIDTH j, x[i, n] = x[i * row + n * step]
*/
INLINE void multiply(const unit *x, long row, long step, const unit *y, long y_step, long steps, int vectors,
                     float *to, long to_row, int add) {
    v sum[ROWS][2];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = add ? AT(to, i * to_row + j * WIDTH) : (v){0};
    for (long n = 0; n < steps; n++)
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < vectors; j++)
                sum[i][j] = plus_product(sum[i][j], x[i * row + n * step], y + n * y_step + j * WIDTH);
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < vectors; j++) AT(to, i * to_row + j * WIDTH) = sum[i][j];
}

/* --- what is called from outside; 0: done, 1: no memory left ---------------------------------------------------- */

/* G g G^T (36, I, O), in panels, pairs being neighbours among the I, of filters (3, 3, I, O) whose numbers are `y`,
`x`, `in` and `out` apart. */
int limner_filters(const float *filters, long y, long x, long in, long out, long ins, long outs, unit *to) {
#pragma omp parallel for schedule(static) collapse(2)
    for (long o = 0; o < outs; o += WIDTH)
        for (long near = 0; near < ins; near += WIDTH) {
            float seen[9][WIDTH][WIDTH]; /* number, in, out; volatile, or the compiler gathers: ten times slower */
            for (int k = 0; k < 9; k++)
                for (int lane = 0; lane < WIDTH; lane++)
                    for (int i = 0; i < WIDTH; i++)
                        *(volatile float *)&seen[k][i][lane] =
                            filters[k / 3 * y + k % 3 * x + (near + i) * in + (o + lane) * out];
            for (int i = 0; i < WIDTH; i += PAIR) {
                v made[2][36], half[18];
                for (int one = 0; one < PAIR; one++) {
                    v small[9];
                    for (int k = 0; k < 9; k++) small[k] = AT(seen[k][i + one], 0);
                    for (int j = 0; j < 3; j++) g(small + j, 3, half + j, 3);
                    for (int k = 0; k < 6; k++) g(half + 3 * k, 1, made[one] + 6 * k, 1);
                }
                long row = in_panels((near + i) / PAIR, o, ins / PAIR, outs);
                for (int k = 0; k < 36; k++)
                    in_pairs(to + k * (ins / PAIR) * outs + row, made[0][k], made[PAIR - 1][k]);
            }
        }
    return 0;
}

/* (N, H, W, C) and filters (36, C, O) in panels -> (N, H, W, O) + bias (O) + residual (N, H, W, O), or NULL for them;
with bias_step = O the bias is (N, O), with 0 the same for all. */
int limner_convolve(const number *picture, const unit *filters, const float *bias, long bias_step,
                    const number *residual, number *to, Shape s, long outs) {
    long units = s.channels / PAIR, count = tiles_of(s).count, threads = omp_get_max_threads();
    Shape result = {s.pictures, s.height, s.width, outs};
    long blocks = (count + BLOCK * threads - 1) / (BLOCK * threads) * threads; /* as many for each thread */
    long block = ((count + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
    number *nothing = calloc((size_t)s.channels, sizeof(number));
    int failed = !nothing;
#pragma omp parallel
    {
        unit *seen = aligned_alloc(64, sizeof(unit) * 36 * BLOCK * (units + PANEL));
        float *made = seen ? (float *)(seen + 36 * BLOCK * units) : NULL;
        if (!seen) failed = 1;
#pragma omp for schedule(static)
        for (long first = 0; first < count; first += block) {
            if (!seen || !nothing) continue;
            long last = least(first + block, count);
            take(picture, s, first, block, nothing, seen);
            for (long o = 0; o < outs; o += PANEL) {
                int wide = (int)least(PANEL, outs - o);
                for (long k = 0; k < 36; k++)
                    for (long row = 0; row < last - first; row += ROWS) {
                        const unit *x = seen + (k * block + row) * units, *y = filters + (k * outs + o) * units;
                        float *out = made + (k * BLOCK + row) * PANEL;
                        if (wide == PANEL) multiply(x, units, 1, y, PANEL, units, 2, out, PANEL, 0);
                        else multiply(x, units, 1, y, WIDTH, units, 1, out, PANEL, 0);
                    }
                put(made, bias ? bias + o : NULL, bias_step, residual ? residual + o : NULL, to + o, result, first,
                    last, wide);
            }
        }
        free(seen);
    }
    free(nothing);
    return failed;
}

/* The gradient (O, 3, 3, C) by the filters, from the picture (N, H, W, C) and that by the result (N, H, W, O). Each
worker sums over tiles of its own. Where they are fewer than the threads, some of these wait: a smaller team would end
them, and the next would have to start others. */
int limner_by_filter(const number *picture, const number *gradient, float *to, Shape s, long outs) {
    long ins = s.channels, count = tiles_of(s).count, size = 36 * ins * outs, most = size > SUMS ? MANY : FEW;
    Shape result = {s.pictures, s.height, s.width, outs};
    long workers = least(omp_get_max_threads(), least((count + FEW - 1) / FEW, 1 + MOST / size));
    long blocks = (count + most * workers - 1) / (most * workers); /* of each worker */
    long block = (count + blocks * workers - 1) / (blocks * workers);
    block += block % PAIR;
    workers = (count + blocks * block - 1) / (blocks * block); /* that have any tiles */
    float *sums = aligned_alloc(64, sizeof(float) * workers * size);
    number *nothing = calloc((size_t)(ins + outs), sizeof(number));
    int failed = !sums || !nothing;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long worker = 0; worker < workers; worker++) {
            long units = block / PAIR;
            unit *seen = aligned_alloc(64, sizeof(unit) * 36 * units * (ins + outs)), *asked = seen + 36 * units * ins;
            float *own = sums + worker * size;
            if (!seen) failed = 1;
            for (long part = 0; part < blocks && sums && nothing && seen; part++) {
                long first = (worker * blocks + part) * block;
                take_in_panels(picture, s, first, block, 0, nothing, seen);
                take_in_panels(gradient, result, first, block, 1, nothing, asked);
                for (long k = 0; k < 36; k++)
                    for (long o = 0; o < outs; o += ROWS) {
                        const unit *x = asked + k * units * outs + in_panels(0, o, units, outs);
                        long step = least(PANEL, outs - o / PANEL * PANEL);
                        for (long c = 0; c < ins; c += PANEL) {
                            const unit *y = seen + (k * ins + c) * units;
                            float *sum = own + (k * outs + o) * ins + c;
                            if (ins - c >= PANEL) multiply(x, 1, step, y, PANEL, units, 2, sum, ins, part > 0);
                            else multiply(x, 1, step, y, WIDTH, units, 1, sum, ins, part > 0);
                        }
                    }
            }
            free(seen);
        }
#pragma omp for schedule(static)
        for (long o = 0; o < outs; o++)
            for (long c = 0; c < ins && !failed; c += WIDTH) {
                v u[36], half[18], small[9];
                for (int k = 0; k < 36; k++) {
                    u[k] = AT(sums, (k * outs + o) * ins + c);
                    for (long w = 1; w < workers; w++) u[k] += AT(sums + w * size, (k * outs + o) * ins + c);
                }
                for (int j = 0; j < 6; j++) g_t(u + j, 6, half + j, 6);
                for (int i = 0; i < 3; i++) g_t(half + 6 * i, 1, small + 3 * i, 1);
                for (int k = 0; k < 9; k++) AT(to, (o * 9 + k) * ins + c) = small[k];
            }
    }
    free(sums);
    free(nothing);
    return failed;
}
