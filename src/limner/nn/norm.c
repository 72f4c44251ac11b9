/* Group norm, (1 + scale) GroupNorm(x) + shift, and SiLU after it: forward in two passes over each picture, backward in
two, of which the first leaves dh where dx will be (in bf16 rounded). Pictures are (B, N pixels, C) of `number`, all
else is float; scale and shift (B, C) or NULL; C is a multiple of WIDTH. */

#include "vectors.h"

#define RUN 64 /* pixels whose sum is taken before it is added to the rest: so less is rounded away */

typedef struct { long batch, pixels, channels, groups; } Norm;

/* 1 / (1 + exp(-x)) = 1 / (1 + 2^whole 2^f), f within -1/2 to 1/2 by the series of exp(f ln 2), to 1e-7. */
#ifdef __AVX512F__
#ifdef BF16
#define TERMS 5 /* of the series: 1e-4 is far below what rounding to bf16 leaves out */
#else
#define TERMS 8
#endif

INLINE v sigmoid(v x) {
    const float ln = 0.693147181f;
    float series[TERMS] = {1};
    for (int n = 1; n < TERMS; n++) series[n] = series[n - 1] * ln / n;
    __m512 t = _mm512_max_ps(_mm512_set1_ps(-126), _mm512_min_ps(_mm512_set1_ps(126), (__m512)(x * -1.44269504f)));
    __m512 near = _mm512_roundscale_ps(t, 0);
    v f = (v)t - (v)near, e = (v){0} + series[TERMS - 1];
    for (int n = TERMS - 2; n >= 0; n--) e = e * f + series[n];
    v below = 1 + (v)_mm512_scalef_ps((__m512)e, near), s = (v)_mm512_rcp14_ps((__m512)below);
    return sizeof(number) == 2 ? s : s * (2 - below * s); /* a division takes as long as all the rest */
}
#else
INLINE v sigmoid(v x) {
    v t = x * -1.44269504f;
    whole low = t < 126.0f, high = t > -126.0f;
    t = (v)(((whole)t & low) | ((whole)((v){0} + 126.0f) & ~low));
    t = (v)(((whole)t & high) | ((whole)((v){0} - 126.0f) & ~high));
    v near = (t + 12582912.0f) - 12582912.0f, f = (t - near) * 0.693147181f; /* 3 2^22: rounds to whole numbers */
    v e = 1 + f * (1 + f * (0.5f + f * (1 / 6.0f + f * (1 / 24.0f + f * (1 / 120.0f + f * (1 / 720.0f))))));
    whole power = (__builtin_convertvector(near, whole) + 127) << 23;
    return 1 / (1 + e * (v)power);
}
#endif

/* The mean over each group, for all its channels. */
static void over_group(float *values, Norm n) {
    long size = n.channels / n.groups;
    for (long g = 0; g < n.channels; g += size) {
        double sum = 0;
        for (long c = g; c < g + size; c++) sum += values[c];
        for (long c = g; c < g + size; c++) values[c] = (float)(sum / size);
    }
}

/* y = gain x + offset: the whole of norm, scale and shift */
static void affine(const float *gamma, const float *beta, const float *scale, const float *shift, const float *mean,
                   const float *rstd, long channels, float *gain, float *offset) {
    for (long c = 0; c < channels; c++) {
        float more = 1 + (scale ? scale[c] : 0);
        gain[c] = rstd[c] * gamma[c] * more;
        offset[c] = beta[c] * more + (shift ? shift[c] : 0) - mean[c] * gain[c];
    }
}

/* Gives y, and mean and 1 / standard deviation (B, C) of each channel's group. */
int limner_norm(const number *pictures, const float *gamma, const float *beta, const float *scales,
                 const float *shifts, number *results, float *means, float *rstds, Norm n, float eps, long silu) {
#pragma omp parallel for schedule(static)
    for (long b = 0; b < n.batch; b++) {
        const number *x = pictures + b * n.pixels * n.channels;
        number *y = results + b * n.pixels * n.channels;
        float *mean = means + b * n.channels, *rstd = rstds + b * n.channels;
        float gain[n.channels], offset[n.channels];
        for (long c = 0; c < n.channels; c++) mean[c] = rstd[c] = 0;
        for (long from = 0; from < n.pixels; from += RUN) {
            float part[n.channels], square[n.channels];
            for (long c = 0; c < n.channels; c++) part[c] = square[c] = 0;
            for (long p = from; p < from + RUN && p < n.pixels; p++)
                for (long c = 0; c < n.channels; c += WIDTH) {
                    v seen = get(x + p * n.channels + c);
                    AT(part, c) += seen;
                    AT(square, c) += seen * seen;
                }
            for (long c = 0; c < n.channels; c++) {
                mean[c] += part[c] / n.pixels;
                rstd[c] += square[c] / n.pixels;
            }
        }
        over_group(mean, n);
        over_group(rstd, n);
        for (long c = 0; c < n.channels; c++) {
            float variance = rstd[c] - mean[c] * mean[c];
            rstd[c] = 1 / __builtin_sqrtf((variance > 0 || variance != variance ? variance : 0) + eps);
        }
        affine(gamma, beta, scales ? scales + b * n.channels : 0, shifts ? shifts + b * n.channels : 0, mean, rstd,
               n.channels, gain, offset);
        for (long p = 0; p < n.pixels; p++)
            for (long c = 0; c < n.channels; c += WIDTH) {
                v h = get(x + p * n.channels + c) * AT(gain, c) + AT(offset, c);
                set(y + p * n.channels + c, silu ? h * sigmoid(h) : h);
            }
    }
    return 0;
}

/* From the gradient by y: that by x; and (B, C) the sums over the pixels of dh and of dh x_hat, where h is what SiLU
saw and x_hat = (x - mean) rstd. dx = rstd (weight dh - mean of weight dh - x_hat mean of weight dh x_hat), means over
the group and weight = gamma (1 + scale). */
int limner_norm_back(const number *pictures, const number *gradients, const float *gamma, const float *beta,
                      const float *scales, const float *shifts, const float *means, const float *rstds, number *results,
                      float *totals, float *with_hats, Norm n, long silu) {
#pragma omp parallel for schedule(static)
    for (long b = 0; b < n.batch; b++) {
        const number *x = pictures + b * n.pixels * n.channels, *dy = gradients + b * n.pixels * n.channels;
        const float *mean = means + b * n.channels, *rstd = rstds + b * n.channels;
        const float *scale = scales ? scales + b * n.channels : 0, *shift = shifts ? shifts + b * n.channels : 0;
        number *dx = results + b * n.pixels * n.channels;
        float *total = totals + b * n.channels, *with_hat = with_hats + b * n.channels;
        float gain[n.channels], offset[n.channels], share_1[n.channels], share_2[n.channels];
        affine(gamma, beta, scale, shift, mean, rstd, n.channels, gain, offset);
        for (long c = 0; c < n.channels; c++) total[c] = with_hat[c] = 0;
        for (long from = 0; from < n.pixels; from += RUN) {
            float part[n.channels], part_x[n.channels];
            for (long c = 0; c < n.channels; c++) part[c] = part_x[c] = 0;
            for (long p = from; p < from + RUN && p < n.pixels; p++)
                for (long c = 0; c < n.channels; c += WIDTH) {
                    v dh = get(dy + p * n.channels + c), seen = get(x + p * n.channels + c);
                    if (silu) {
                        v h = seen * AT(gain, c) + AT(offset, c), s = sigmoid(h);
                        dh *= s * (1 + h * (1 - s));
                    }
                    set(dx + p * n.channels + c, dh);
                    AT(part, c) += dh;
                    AT(part_x, c) += dh * (seen - AT(mean, c));
                }
            for (long c = 0; c < n.channels; c++) {
                total[c] += part[c];
                with_hat[c] += part_x[c] * rstd[c];
            }
        }
        for (long c = 0; c < n.channels; c++) {
            float weight = gamma[c] * (1 + (scale ? scale[c] : 0));
            share_1[c] = total[c] * weight / n.pixels;
            share_2[c] = with_hat[c] * weight / n.pixels;
        }
        over_group(share_1, n);
        over_group(share_2, n);
        for (long c = 0; c < n.channels; c++) { /* dx = gain dh + share_1 + share_2 x */
            share_2[c] *= -rstd[c] * rstd[c];
            share_1[c] = -rstd[c] * share_1[c] - mean[c] * share_2[c];
        }
        for (long p = 0; p < n.pixels; p++)
            for (long c = 0; c < n.channels; c += WIDTH) {
                long here = p * n.channels + c;
                set(dx + here, AT(gain, c) * get(dx + here) + AT(share_1, c) + AT(share_2, c) * get(x + here));
            }
    }
    return 0;
}
