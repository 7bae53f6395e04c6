/* Rows of W + left @ right, rounded to the result's own type, with a proof for each element that the rounding is the right one.

   Results have 16 bits. The product is summed in float32. What that may be off by is bounded for each element, and where both ends of the bound
   round to the same number, that number is the exact sum's. The others, one in some thousands, are summed in float64 under a bound of its own;
   those still in doubt then, as good as none but exact ties, are listed for whoever calls. So the bytes are the same whatever the order of the
   sums, the vector width or the processor.

   One thing is taken for granted: IEEE arithmetic without flushing of small numbers to zero. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BF16, F16, F32 };
enum { TILE = 512, ROWS = 8, STEP = 4 };

#define INLINE static inline __attribute__((always_inline))

/* A block of rows, row-major: `left` [rows][r], scaled, and `tiles`, which is `right` [r][columns] cut into [columns / TILE][r][TILE] and padded
   with zeros (the rows of a matrix whose width is a power of two would push one another out of the cache). The product's element (i, j) is off
   by less than row_reach[i] * reach[j] + small. `exact_left` is `left` before it was rounded to float, `exact_right` [columns][r] is `right`.
   r is a multiple of STEP. */
typedef struct {
    const void *base;
    const float *left, *tiles, *row_reach, *reach, *exact_right;
    const double *exact_left;
    uint16_t *out;
    int32_t *doubtful;
    int64_t rows, columns, r, capacity;
    float small;
} Block;

typedef struct {
    double base_square, result_square;
    int64_t changed, doubtful;
} Sums;

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

INLINE uint32_t to_bf16(float x)
{
    uint32_t u = bits_of(x);
    return (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
}

/* Giesen's conversions: the hardware's float32 arithmetic does the shifting and rounding of subnormals. */
INLINE uint32_t to_f16(float x)
{
    uint32_t u = bits_of(x), sign = u & 0x80000000u;
    u ^= sign;
    uint32_t small = bits_of(float_of(u) + 0.5f) - 0x3F000000u;
    uint32_t normal = (u + 0xC8000FFFu + ((u >> 13) & 1u)) >> 13;
    uint32_t huge = u > 0x7F800000u ? 0x7E00u : 0x7C00u;
    uint32_t half = u < 0x38800000u ? small : normal;
    return (u >= 0x47800000u ? huge : half) | (sign >> 16);
}

INLINE float from_f16(uint32_t h)
{
    uint32_t u = (h & 0x7FFFu) << 13;
    float x = float_of(u) * 0x1p112f;
    uint32_t wide = u >= 0x0F800000u ? u | 0x7F800000u : bits_of(x);
    return float_of(wide | (h & 0x8000u) << 16);
}

INLINE float widen(const void *base, int kind, int64_t at)
{
    if (kind == BF16) return float_of((uint32_t)((const uint16_t *)base)[at] << 16);
    if (kind == F16) return from_f16(((const uint16_t *)base)[at]);
    return ((const float *)base)[at];
}

INLINE uint32_t narrow(float x, int kind) { return kind == BF16 ? to_bf16(x) : to_f16(x); }

/* The same where a value in the middle between two numbers may go to either. The ends of a bound may: what is bounded lies truly between them. */
INLINE uint32_t narrow_but_for_ties(float x, int kind) { return kind == BF16 ? (bits_of(x) + 0x8000u) >> 16 : to_f16(x); }

/* Whether two numbers of 16 bits are not the same; zeros of either sign are. */
INLINE uint32_t differs(uint32_t one, uint32_t other) { return (one != other) & (((one | other) & 0x7FFFu) != 0); }

/* float64 to float32, rounded to odd: rounding that to 16 bits then gives what rounding the float64 would. */
INLINE float to_odd(double x)
{
    float near = (float)x;
    uint32_t u = bits_of(near);
    if ((double)near != x && !(u & 1u) && fabsf(near) < INFINITY)
        u = near == 0 ? (uint32_t)(x < 0) << 31 | 1u : fabs(x) > fabs((double)near) ? u + 1 : u - 1;
    return float_of(u);
}

/* The loops are compiled for each kind of processor; the best one that this processor has is chosen when they are first called. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_VARIANTS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define NAME(x) x##_v4
#include "kernel_loops.h"
#undef NAME
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define NAME(x) x##_v3
#include "kernel_loops.h"
#undef NAME
#pragma GCC pop_options
#endif
#define NAME(x) x##_plain
#include "kernel_loops.h"

void ckpt_sum(const Block *block, int kind, int out_kind, Sums *sums)
{
#ifdef HAS_VARIANTS
    if (__builtin_cpu_supports("x86-64-v4")) sum_v4(block, kind, out_kind, sums);
    else if (__builtin_cpu_supports("x86-64-v3")) sum_v3(block, kind, out_kind, sums);
    else
#endif
        sum_plain(block, kind, out_kind, sums);
}
