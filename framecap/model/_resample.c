/* Pillow's antialiased resize of an RGB square (src/libImaging/Resample.c: two passes, weights in 22-bit fixed
 * point, rounding to bytes in between), restated for speed: the same bytes come out. Integers only; the weights
 * are computed by resample.py.
 *
 * A weight w < 2^22 + 2 is kept as two 16-bit halves, w = hi * 2^11 + lo, in pairs of taps, which is what
 * pmaddwd multiplies: hi and lo sums stay far below 2^31, and together they are the exact 32-bit sum.
 *
 * No Python.h: loaded with ctypes, so that it builds where Python's headers are not installed.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WEIGHT_BITS 22
#define LOW_BITS 11
#define HALF (1 << (WEIGHT_BITS - 1))
#define SLACK 64 /* bytes that vector loads and stores may touch beyond a row */

typedef struct {
    int32_t taps;          /* per output, a multiple of 4; surplus taps weigh 0 */
    const int32_t *starts; /* [resolution] first input of each output */
    const int32_t *high;   /* [resolution, taps / 2] pairs of 16-bit halves */
    const int32_t *low;
} Filter;

typedef void (*HorizontalPass)(const uint8_t *const rows[2], uint8_t *const out[2], int resolution, Filter filter);
typedef void (*VerticalPass)(const uint8_t *const *rows, uint8_t *out, int bytes, const int32_t *high,
                             const int32_t *low, int pairs);

static int32_t weight_of(const int32_t *high, const int32_t *low, int tap) {
    int shift = tap % 2 ? 16 : 0;
    int32_t hi = (high[tap / 2] >> shift) & 0xffff, lo = (low[tap / 2] >> shift) & 0xffff;
    return (hi << LOW_BITS) + lo;
}

static void horizontal_plain(const uint8_t *const rows[2], uint8_t *const out[2], int resolution, Filter filter) {
    for (int r = 0; r < 2; r++) {
        for (int x = 0; x < resolution; x++) {
            const uint8_t *pixel = rows[r] + 3 * filter.starts[x];
            const int32_t *high = filter.high + x * (filter.taps / 2), *low = filter.low + x * (filter.taps / 2);
            int32_t sum[3] = {HALF, HALF, HALF};
            for (int tap = 0; tap < filter.taps; tap++, pixel += 3) {
                int32_t weight = weight_of(high, low, tap);
                for (int c = 0; c < 3; c++) sum[c] += pixel[c] * weight;
            }
            for (int c = 0; c < 3; c++) out[r][3 * x + c] = (uint8_t)(sum[c] >> WEIGHT_BITS);
        }
    }
}

static void vertical_plain(const uint8_t *const *rows, uint8_t *out, int bytes, const int32_t *high,
                           const int32_t *low, int pairs) {
    for (int i = 0; i < bytes; i++) {
        int32_t sum = HALF;
        for (int tap = 0; tap < 2 * pairs; tap++) sum += rows[tap][i] * weight_of(high, low, tap);
        out[i] = (uint8_t)(sum >> WEIGHT_BITS);
    }
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

/* Two rows at a time, one per 128-bit lane; four taps (12 of 16 loaded bytes) a step. */
AVX2 static void horizontal_avx2(const uint8_t *const rows[2], uint8_t *const out[2], int resolution, Filter filter) {
    const __m256i first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i second = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1));
    const __m256i bytes = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m256i half = _mm256_set1_epi32(HALF);
    const int32_t *high = filter.high, *low = filter.low;
    for (int x = 0; x < resolution; x++) {
        const uint8_t *upper = rows[0] + 3 * filter.starts[x], *lower = rows[1] + 3 * filter.starts[x];
        __m256i sum_high = _mm256_setzero_si256(), sum_low = half;
        for (int tap = 0; tap < filter.taps; tap += 4, high += 2, low += 2, upper += 12, lower += 12) {
            __m256i pixels = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)upper)),
                _mm_loadu_si128((const __m128i *)lower), 1);
            __m256i a = _mm256_shuffle_epi8(pixels, first), b = _mm256_shuffle_epi8(pixels, second);
            sum_high = _mm256_add_epi32(sum_high, _mm256_madd_epi16(a, _mm256_set1_epi32(high[0])));
            sum_low = _mm256_add_epi32(sum_low, _mm256_madd_epi16(a, _mm256_set1_epi32(low[0])));
            sum_high = _mm256_add_epi32(sum_high, _mm256_madd_epi16(b, _mm256_set1_epi32(high[1])));
            sum_low = _mm256_add_epi32(sum_low, _mm256_madd_epi16(b, _mm256_set1_epi32(low[1])));
        }
        __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(sum_high, LOW_BITS), sum_low);
        sum = _mm256_shuffle_epi8(_mm256_srli_epi32(sum, WEIGHT_BITS), bytes);
        int32_t upper_pixel = _mm256_cvtsi256_si32(sum), lower_pixel = _mm256_extract_epi32(sum, 4);
        memcpy(out[0] + 3 * x, &upper_pixel, 4);
        memcpy(out[1] + 3 * x, &lower_pixel, 4);
    }
}

/* Eight bytes of two rows a step. */
AVX2 static void vertical_avx2(const uint8_t *const *rows, uint8_t *out, int bytes, const int32_t *high,
                               const int32_t *low, int pairs) {
    const __m256i half = _mm256_set1_epi32(HALF);
    for (int i = 0; i < bytes; i += 8) {
        __m256i sum_high = _mm256_setzero_si256(), sum_low = half;
        for (int pair = 0; pair < pairs; pair++) {
            __m128i even = _mm_loadl_epi64((const __m128i *)(rows[2 * pair] + i));
            __m128i odd = _mm_loadl_epi64((const __m128i *)(rows[2 * pair + 1] + i));
            __m256i both = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd));
            sum_high = _mm256_add_epi32(sum_high, _mm256_madd_epi16(both, _mm256_set1_epi32(high[pair])));
            sum_low = _mm256_add_epi32(sum_low, _mm256_madd_epi16(both, _mm256_set1_epi32(low[pair])));
        }
        __m256i sum = _mm256_srli_epi32(_mm256_add_epi32(_mm256_slli_epi32(sum_high, LOW_BITS), sum_low), WEIGHT_BITS);
        __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        _mm_storel_epi64((__m128i *)(out + i), _mm_packus_epi16(words, words));
    }
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#else
#define horizontal_avx2 horizontal_plain
#define vertical_avx2 vertical_plain
static int has_avx2(void) { return 0; }
#endif

/* source: uint8, the first byte of a side x side square of RGB pixels, stride bytes from row to row.
 * target: uint8 [resolution, resolution, 3]. One filter serves both passes. plain: leave vector code out.
 * Returns 0, or -1 when there is no memory. */
int framecap_resample_square(const uint8_t *source, int64_t stride, int side, uint8_t *target, int resolution,
                             int taps, const int32_t *starts, const int32_t *high, const int32_t *low, int plain) {
    Filter filter = {taps, starts, high, low};
    HorizontalPass horizontal = plain || !has_avx2() ? horizontal_plain : horizontal_avx2;
    VerticalPass vertical = plain || !has_avx2() ? vertical_plain : vertical_avx2;
    size_t in_bytes = 3 * ((size_t)side + taps) + SLACK, out_bytes = 3 * (size_t)resolution + SLACK;
    int ring = taps + 2; /* rows of the first pass that are still needed, by row number modulo ring */
    uint8_t *memory = calloc(1, 2 * in_bytes + (ring + 1) * out_bytes + taps * sizeof(uint8_t *));
    if (!memory) return -1;
    const uint8_t **window = (const uint8_t **)memory;
    uint8_t *inputs[2] = {memory + taps * sizeof(uint8_t *), memory + taps * sizeof(uint8_t *) + in_bytes};
    uint8_t *rows = inputs[1] + in_bytes, *result = rows + ring * out_bytes;
    int done = 0;
    for (int y = 0; y < resolution; y++) {
        int last = starts[y] + taps < side ? starts[y] + taps : side;
        for (; done < last; done += 2) {
            for (int r = 0; r < 2; r++) {
                int row = done + r < side ? done + r : side - 1;
                memcpy(inputs[r], source + row * stride, 3 * (size_t)side);
            }
            uint8_t *out[2] = {rows + done % ring * out_bytes, rows + (done + 1) % ring * out_bytes};
            horizontal((const uint8_t *const *)inputs, out, resolution, filter);
        }
        for (int tap = 0; tap < taps; tap++) window[tap] = rows + (starts[y] + tap) % ring * out_bytes;
        vertical(window, result, 3 * resolution, high + y * (taps / 2), low + y * (taps / 2), taps / 2);
        memcpy(target + y * 3 * (size_t)resolution, result, 3 * (size_t)resolution);
    }
    free(memory);
    return 0;
}
