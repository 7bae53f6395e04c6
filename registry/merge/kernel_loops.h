/* The loops of kernel.c, which includes this file once for each kind of processor, with NAME giving each its own names. */

/* acc[q][j] = sum over k of left[q][k] * tile[k][j], r a multiple of STEP. Products are added up STEP at a time, so that each is rounded at most
   STEP + r / STEP times on its way. */
static void NAME(product)(float (*restrict acc)[TILE], const float *restrict left, int64_t rows, const float *restrict tile, int64_t r)
{
    for (int q = 0; q < ROWS; q++)
        for (int j = 0; j < TILE; j++) acc[q][j] = 0;
    for (int64_t k = 0; k < r; k += STEP) {
        const float *a = tile + k * TILE;
        float b[ROWS][STEP];
        for (int q = 0; q < ROWS; q++)
            for (int s = 0; s < STEP; s++) b[q][s] = left[(q < rows ? q : rows - 1) * r + k + s];
        for (int j = 0; j < TILE; j++) {
#pragma GCC unroll 8
            for (int q = 0; q < ROWS; q++) {
                float some = b[q][0] * a[j];
#pragma GCC unroll 4
                for (int s = 1; s < STEP; s++) some += b[q][s] * a[s * TILE + j];
                acc[q][j] += some;
            }
        }
    }
}

/* Settle a doubtful element in float64, whose errors are some 2^-26 of those of float32; list it when even that is not enough. */
INLINE void NAME(settle)(const Block *block, int kind, int out_kind, int64_t row, int64_t column, Sums *sums)
{
    const double *left = block->exact_left + row * block->r;
    const float *right = block->exact_right + column * block->r;
    int64_t at = row * block->columns + column;
    float w = widen(block->base, kind, at);
    double x = 0;
#pragma omp simd reduction(+ : x)
    for (int64_t k = 0; k < block->r; k++) x += left[k] * right[k];
    x += w;
    double error = 0x1p-50 * fabs(x) + 0x1p-24 * (block->row_reach[row] * block->reach[column] + block->small);
    uint32_t low = narrow(to_odd(x - error), out_kind), high = narrow(to_odd(x + error), out_kind), before = block->out[at];
    uint32_t old = narrow(w, out_kind);
    block->out[at] = (uint16_t)high;
    sums->changed += (int64_t)differs(high, old) - (int64_t)differs(before, old);
    if (low == high) return;
    if (sums->doubtful < block->capacity) block->doubtful[sums->doubtful] = (int32_t)at;
    sums->doubtful++;
}

/* Find the doubtful elements among the m of a row from `column` on, and settle them. */
INLINE void NAME(settle_all)(const Block *block, int kind, int out_kind, const uint32_t *doubt, int64_t row, int64_t column, int64_t m, Sums *sums)
{
    uint8_t flags[TILE];
    int32_t found[TILE];
    int count = 0;
    for (int64_t j = 0; j < m; j++) flags[j] = doubt[j] != 0;
    for (int64_t j = m; j % 8; j++) flags[j] = 0;
    for (int64_t j = 0; j < m; j += 8) {
        uint64_t word;
        memcpy(&word, flags + j, 8);
        for (; word; word &= word - 1) found[count++] = (int32_t)(j + __builtin_ctzll(word) / 8);
    }
    for (int i = 0; i < count; i++) NAME(settle)(block, kind, out_kind, row, column + found[i], sums);
}

/* One row of a tile: add the base, round, and see what can be told of it. */
INLINE void NAME(finish)(const Block *block, int kind, int out_kind, const float *product, int64_t row, int64_t column, int64_t m, Sums *sums)
{
    int64_t at = row * block->columns + column;
    const void *base = block->base;
    const float *reach = block->reach + column;
    float row_reach = block->row_reach[row], small = block->small;
    uint16_t *out = block->out + at;
    uint32_t doubt[TILE], any = 0, changed = 0;
    double base_square = 0; /* in float32 its digits would depend on the order, and with it on the processor */
    float result_square = 0;
#pragma omp simd reduction(+ : base_square, result_square, changed) reduction(| : any)
    for (int64_t j = 0; j < m; j++) {
        float w = widen(base, kind, at + j), x = w + product[j];
        float error = 0x1.1p-23f * fabsf(x) + (row_reach * reach[j] + small);
        uint32_t low = narrow_but_for_ties(x - error, out_kind), high = narrow_but_for_ties(x + error, out_kind);
        doubt[j] = low ^ high;
        any |= low ^ high;
        out[j] = (uint16_t)high;
        changed += kind == out_kind && kind == BF16 ? float_of(high << 16) != w : differs(high, narrow(w, out_kind));
        base_square += (double)w * (double)w;
        result_square += x * x;
    }
    sums->base_square += base_square;
    sums->result_square += result_square;
    sums->changed += changed;
    if (any) NAME(settle_all)(block, kind, out_kind, doubt, row, column, m, sums);
}

INLINE void NAME(sum_kinds)(const Block *block, int kind, int out_kind, Sums *sums)
{
    float acc[ROWS][TILE];
    for (int64_t start = 0; start < block->columns; start += TILE) {
        int64_t m = block->columns - start < TILE ? block->columns - start : TILE;
        for (int64_t i = 0; i < block->rows; i += ROWS) {
            int64_t rows = block->rows - i < ROWS ? block->rows - i : ROWS;
            NAME(product)(acc, block->left + i * block->r, rows, block->tiles + start * block->r, block->r);
            for (int64_t q = 0; q < rows; q++) NAME(finish)(block, kind, out_kind, acc[q], i + q, start, m, sums);
        }
    }
}

/* Each pair of kinds is a loop of its own, so that the compiler can make vector code of it. */
#define CASE(IN, OUT) if (kind == IN && out_kind == OUT) NAME(sum_kinds)(block, IN, OUT, sums)
static void NAME(sum)(const Block *block, int kind, int out_kind, Sums *sums)
{
    CASE(BF16, BF16);
    CASE(F16, BF16);
    CASE(F32, BF16);
    CASE(BF16, F16);
    CASE(F16, F16);
    CASE(F32, F16);
}
#undef CASE
