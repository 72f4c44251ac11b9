/* 3x3 convolutions of stride 1 with padding 1 by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2015,
1509.09308): y = A^T [(G g G^T) . (B^T d B)] A for each tile y of 4x4 pixels and the 6x6 pixels d that it depends on.

Pictures are (N, H, W, C) of `number`, what lies outside of one is zero; all else is float. The 36 numbers of a tile,
or of a filter, come first: tiles (36, T, C), filters (36, C, O). C and O are multiples of WIDTH. In panels, such a
matrix (R, C) is cut into (R, PANEL), one after another, the last of which may be narrower: read that way, its rows
don't push each other out of the cache. */

#include <omp.h>
#include <stdlib.h>

#include "vectors.h"

#define ROWS (WIDTH / 2) /* of a product of matrices that are worked out together, as many as there are registers for */
#define PANEL (2 * WIDTH)
#define BLOCK 48 /* tiles in work at a time: they are to stay in the cache next to the core */
#define FEW 24 /* the same, where sums over tiles are to stay there as well; */
#define MANY 96 /* and where these are too many for that */
#define SUMS (36L * 96 * 96) /* as many still stay there */
#define MOST (1L << 28) /* numbers in the sums of all workers together */

typedef struct { long pictures, height, width, channels; } Shape;
typedef struct { long across, down, count; } Tiles;

static long least(long a, long b) { return a < b ? a : b; }

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
    v p = d4 - 4 * d2, q = d3 - 4 * d1, r = d4 - d2, t = 2 * (d3 - d1);
    to[0] = 4 * d0 - 5 * d2 + d4;
    to[apart] = p + q;
    to[2 * apart] = p - q;
    to[3 * apart] = r + t;
    to[4 * apart] = r - t;
    to[5 * apart] = 4 * d1 - 5 * d3 + d5;
}

INLINE void a_t(const v *from, int step, v *to, int apart) { /* A^T m */
    v p = from[step] + from[2 * step], q = from[step] - from[2 * step];
    v r = from[3 * step] + from[4 * step], t = from[3 * step] - from[4 * step];
    to[0] = from[0] + p + r;
    to[apart] = q + 2 * t;
    to[2 * apart] = p + 4 * r;
    to[3 * apart] = q + 8 * t + from[5 * step];
}

INLINE void a(const v *from, int step, v *to, int apart) { /* A y, the adjoint of the last */
    v y0 = from[0], y1 = from[step], y2 = from[2 * step], y3 = from[3 * step];
    v p = y0 + y2, q = y1 + y3, r = y0 + 4 * y2, t = 2 * y1 + 8 * y3;
    to[0] = y0;
    to[apart] = p + q;
    to[2 * apart] = p - q;
    to[3 * apart] = r + t;
    to[4 * apart] = r - t;
    to[5 * apart] = y3;
}

INLINE void g(const v *from, int step, v *to, int apart) { /* G g */
    v g0 = from[0], g1 = from[step], g2 = from[2 * step];
    v p = (g0 + g2) * (-1.0f / 6), q = g1 * (1.0f / 6), r = g0 * (1.0f / 24) + g2 * (1.0f / 6), t = g1 * (1.0f / 12);
    to[0] = g0 * 0.25f;
    to[apart] = p - q;
    to[2 * apart] = p + q;
    to[3 * apart] = r + t;
    to[4 * apart] = r - t;
    to[5 * apart] = g2;
}

INLINE void g_t(const v *from, int step, v *to, int apart) { /* G^T u */
    v p = from[step] + from[2 * step], q = from[2 * step] - from[step];
    v r = from[3 * step] + from[4 * step], t = from[3 * step] - from[4 * step];
    to[0] = from[0] * 0.25f - p * (1.0f / 6) + r * (1.0f / 24);
    to[apart] = q * (1.0f / 6) + t * (1.0f / 12);
    to[2 * apart] = (r - p) * (1.0f / 6) + from[5 * step];
}

/* --- tiles of a picture ----------------------------------------------------------------------------------------- */

/* Where the `size` x `size` pixels from (top, left) on stand in a picture; -1: outside. */
INLINE void find(Shape s, long top, long left, int size, long *where) {
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++) {
            long y = top + i, x = left + j;
            int inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
            where[i * size + j] = inside ? (y * s.width + x) * s.channels : -1;
        }
}

/* Column `j` of these pixels, of WIDTH channels. */
INLINE void column(const number *picture, const long *where, int size, int j, v *pixels) {
    for (int i = 0; i < size; i++) {
        long here = where[i * size + j];
        pixels[i] = here < 0 ? (v){0} : get(picture + here);
    }
}

/* Into (36, rows, C): B^T d B of the picture's tiles from `first` on, or A y A^T of a gradient's. Beyond the picture's
last tile they are zero. */
INLINE void take(const number *picture, Shape s, long first, long rows, int panels, int of_output, float *to) {
    Tiles t = tiles_of(s);
    for (long tile = first; tile < first + rows; tile++) {
        long start = least(tile, t.count - 1) / (t.down * t.across) * s.height * s.width * s.channels;
        const number *from = picture + start;
        long top = tile / t.across % t.down * 4, left = tile % t.across * 4, where[36];
        if (of_output) find(s, top, left, 4, where);
        else find(s, top - 1, left - 1, 6, where);
        for (long c = 0; c < s.channels; c += WIDTH) {
            long row = tile - first;
            float *out = to + (panels ? in_panels(row, c, rows, s.channels) : row * s.channels + c);
            if (tile >= t.count) {
                for (int k = 0; k < 36; k++) AT(out, k * rows * s.channels) = (v){0};
                continue;
            }
            v pixels[6], half[36], last[6];
            if (of_output)
                for (int j = 0; j < 4; j++) {
                    column(from + c, where, 4, j, pixels);
                    a(pixels, 1, half + j, 4);
                }
            else
                for (int j = 0; j < 6; j++) {
                    column(from + c, where, 6, j, pixels);
                    b_t(pixels, 1, half + j, 6);
                }
            for (int i = 0; i < 6; i++) {
                if (of_output) a(half + 4 * i, 1, last, 1);
                else b_t(half + 6 * i, 1, last, 1);
                for (int j = 0; j < 6; j++) AT(out, (i * 6 + j) * rows * s.channels) = last[j];
            }
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

/* to[i][j] (+)= sum over n of x[i, n] y[n, j] for ROWS i and `vectors` * WIDTH j; x[i, n] = x[i * row + n * step]. */
INLINE void multiply(const float *x, long row, long step, const float *y, long y_step, long steps, int vectors,
                     float *to, long to_row, int add) {
    v sum[ROWS][2];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = add ? AT(to, i * to_row + j * WIDTH) : (v){0};
    for (long n = 0; n < steps; n++) {
        v right[2];
        for (int j = 0; j < vectors; j++) right[j] = AT(y, n * y_step + j * WIDTH);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < vectors; j++) sum[i][j] += x[i * row + n * step] * right[j];
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < vectors; j++) AT(to, i * to_row + j * WIDTH) = sum[i][j];
}

/* --- what is called from outside; 0: done, 1: no memory left ---------------------------------------------------- */

/* G g G^T (36, I, O), in panels, of filters (3, 3, I, O) whose numbers are `y`, `x`, `in` and `out` apart. */
int limner_filters(const float *filters, long y, long x, long in, long out, long ins, long outs, float *to) {
#pragma omp parallel for schedule(static) collapse(2)
    for (long o = 0; o < outs; o += WIDTH)
        for (long near = 0; near < ins; near += WIDTH) {
            float seen[9][WIDTH][WIDTH]; /* number, in, out; volatile, or the compiler gathers: ten times slower */
            for (int k = 0; k < 9; k++)
                for (int lane = 0; lane < WIDTH; lane++)
                    for (int i = 0; i < WIDTH; i++)
                        *(volatile float *)&seen[k][i][lane] =
                            filters[k / 3 * y + k % 3 * x + (near + i) * in + (o + lane) * out];
            for (int i = 0; i < WIDTH; i++) {
                v small[9], half[18], row[6];
                for (int k = 0; k < 9; k++) small[k] = AT(seen[k][i], 0);
                for (int j = 0; j < 3; j++) g(small + j, 3, half + j, 3);
                for (int k = 0; k < 6; k++) {
                    g(half + 3 * k, 1, row, 1);
                    for (int j = 0; j < 6; j++)
                        AT(to, (k * 6 + j) * ins * outs + in_panels(near + i, o, ins, outs)) = row[j];
                }
            }
        }
    return 0;
}

/* (N, H, W, C) and filters (36, C, O) in panels -> (N, H, W, O) + bias (O) + residual (N, H, W, O), or NULL for them;
with bias_step = O the bias is (N, O), with 0 the same for all. */
int limner_convolve(const number *picture, const float *filters, const float *bias, long bias_step,
                    const number *residual, number *to, Shape s, long outs) {
    long ins = s.channels, count = tiles_of(s).count, threads = omp_get_max_threads();
    Shape result = {s.pictures, s.height, s.width, outs};
    long blocks = (count + BLOCK * threads - 1) / (BLOCK * threads) * threads; /* as many for each thread */
    long block = ((count + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
    int failed = 0;
#pragma omp parallel
    {
        float *seen = aligned_alloc(64, sizeof(float) * 36 * BLOCK * (ins + PANEL));
        float *made = seen ? seen + 36 * BLOCK * ins : NULL;
        if (!seen) failed = 1;
#pragma omp for schedule(static)
        for (long first = 0; first < count; first += block) {
            if (!seen) continue;
            long last = least(first + block, count);
            take(picture, s, first, block, 0, 0, seen);
            for (long o = 0; o < outs; o += PANEL) {
                int wide = (int)least(PANEL, outs - o);
                for (long k = 0; k < 36; k++)
                    for (long row = 0; row < last - first; row += ROWS) {
                        const float *x = seen + (k * block + row) * ins, *y = filters + (k * outs + o) * ins;
                        float *out = made + (k * BLOCK + row) * PANEL;
                        if (wide == PANEL) multiply(x, ins, 1, y, PANEL, ins, 2, out, PANEL, 0);
                        else multiply(x, ins, 1, y, WIDTH, ins, 1, out, PANEL, 0);
                    }
                put(made, bias ? bias + o : NULL, bias_step, residual ? residual + o : NULL, to + o, result, first,
                    last, wide);
            }
        }
        free(seen);
    }
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
    workers = (count + blocks * block - 1) / (blocks * block); /* that have any tiles */
    float *sums = aligned_alloc(64, sizeof(float) * workers * size);
    int failed = !sums;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long worker = 0; worker < workers; worker++) {
            float *seen = aligned_alloc(64, sizeof(float) * 36 * block * (ins + outs));
            float *asked = seen + 36 * block * ins, *own = sums + worker * size;
            if (!seen) failed = 1;
            for (long part = 0; part < blocks && sums && seen; part++) {
                long first = (worker * blocks + part) * block;
                take(picture, s, first, block, 1, 0, seen);
                take(gradient, result, first, block, 1, 1, asked);
                for (long k = 0; k < 36; k++)
                    for (long o = 0; o < outs; o += ROWS) {
                        const float *x = asked + k * block * outs + in_panels(0, o, block, outs);
                        long step = least(PANEL, outs - o / PANEL * PANEL);
                        for (long c = 0; c < ins; c += PANEL) {
                            const float *y = seen + (k * ins + c) * block;
                            float *sum = own + (k * outs + o) * ins + c;
                            if (ins - c >= PANEL) multiply(x, 1, step, y, PANEL, block, 2, sum, ins, part > 0);
                            else multiply(x, 1, step, y, WIDTH, block, 1, sum, ins, part > 0);
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
    return failed;
}
