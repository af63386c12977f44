/* AVX2.
 *
 * VPMADDWD adds two products of signed 16-bit numbers into each 32-bit lane. A weight is therefore
 * cut into two halves, weight = high * 2^11 + low, and a lane works on two neighbouring taps of one
 * output pixel, whose bytes are widened to 16 bits while they are put in place.
 */
#include "pixels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2")))
#define INLINE TARGET static inline __attribute__((always_inline))
#define HALF 11

/* How many output pixels' four source bytes 16 bytes hold: four, two, or one. */
enum { NEAR, MIDDLE, FAR };

static int supported(void) {
    return __builtin_cpu_supports("avx2");
}

static int32_t pair(int32_t first, int32_t second) {
    return (int32_t)(((uint32_t)second << 16) | ((uint32_t)first & 0xffff));
}

static void pack_quad(const int32_t taps[4], int32_t to[4]) {
    const int32_t low = (1 << HALF) - 1;
    to[0] = pair(taps[0] >> HALF, taps[1] >> HALF);
    to[1] = pair(taps[0] & low, taps[1] & low);
    to[2] = pair(taps[2] >> HALF, taps[3] >> HALF);
    to[3] = pair(taps[2] & low, taps[3] & low);
}

static void pack_horizontal(const Axis *axis, Horizontal *to) {
    const int *first = axis->first;
    to->reach = NEAR;
    for (int x = 0; x < axis->out; x++) {
        if (to->reach == NEAR && first[x] - first[x & ~3] > 12) to->reach = MIDDLE;
        if (first[x] - first[x & ~1] > 12) to->reach = FAR;
    }
    if (to->reach != FAR) memset(to->index, 0x80, (size_t)to->groups * sizeof *to->index);
    for (int x = 0; x < axis->out; x++) {
        int g = x / 8, lane = x % 8;
        /* The load that lane x takes its bytes from, and the load's first byte. */
        int from = to->reach == NEAR ? 2 * (lane / 4) : lane / 2;
        int base = first[to->reach == NEAR ? x & ~3 : to->reach == MIDDLE ? x & ~1 : x & ~7];
        int offset = first[x] - base;
        if (to->reach == FAR) {
            to->base[g][0] = base;
            memcpy(to->index[g] + 4 * lane, &offset, 4);
        } else {
            /* Taps 0 and 1, then 2 and 3, each with a zero byte above it (0x80 gives zero). The
             * second of two loads has indices of its own. */
            to->base[g][from] = base;
            for (int t = 0; t < 4; t++)
                to->index[g][64 * (from % 2) + 32 * (t / 2) + 4 * lane + 2 * (t % 2)] =
                    (uint8_t)(offset + t);
        }
        for (int q = 0; q < to->quads; q++) {
            int32_t parts[4];
            pack_quad(axis->taps + 4L * ((long)x * axis->quads + q), parts);
            for (int part = 0; part < 4; part++)
                to->weights[(long)g * to->quads + q][part][lane] = parts[part];
        }
    }
}

TARGET static void deinterleave(const uint8_t *rgb, long pixels, uint8_t *const planes[3]) {
    __m128i from[3][3]; /* plane, 16 bytes of source */
    for (int p = 0; p < 3; p++)
        for (int part = 0; part < 3; part++) {
            uint8_t index[16];
            for (int i = 0; i < 16; i++) {
                int byte = 3 * i + p - 16 * part;
                index[i] = byte >= 0 && byte < 16 ? (uint8_t)byte : 0x80;
            }
            from[p][part] = _mm_loadu_si128((const __m128i *)index);
        }
    for (long x = 0; x < pixels; x += 16) {
        const __m128i *at = (const __m128i *)(rgb + 3 * x);
        __m128i v0 = _mm_loadu_si128(at), v1 = _mm_loadu_si128(at + 1);
        __m128i v2 = _mm_loadu_si128(at + 2);
        for (int p = 0; p < 3; p++) {
            __m128i v = _mm_or_si128(
                _mm_shuffle_epi8(v0, from[p][0]), _mm_shuffle_epi8(v1, from[p][1]));
            v = _mm_or_si128(v, _mm_shuffle_epi8(v2, from[p][2]));
            _mm_storeu_si128((__m128i *)(planes[p] + x), v);
        }
    }
}

INLINE __m256i load(const void *at) {
    return _mm256_loadu_si256((const __m256i *)at);
}

INLINE __m256i whole(__m256i high, __m256i low) {
    return _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, HALF), low), PRECISION);
}

INLINE void add(__m256i *high, __m256i *low, __m256i v, __m256i by_high, __m256i by_low) {
    *high = _mm256_add_epi32(*high, _mm256_madd_epi16(v, by_high));
    *low = _mm256_add_epi32(*low, _mm256_madd_epi16(v, by_low));
}

/* 16 bytes from each of two places. */
INLINE __m256i load_two(const uint8_t *low, const uint8_t *high) {
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
        _mm_loadu_si128((const __m128i *)high), 1);
}

INLINE void row(const Horizontal *h, const uint8_t *const in[3], uint8_t *const out[3], int reach) {
    const __m256i zero = _mm256_setzero_si256(), rounding = _mm256_set1_epi32(ROUNDING);
    /* Each lane's own four bytes, as pairs. */
    const __m256i own01 = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128));
    const __m256i own23 = _mm256_add_epi8(own01, _mm256_set1_epi32(0x00020002));
    int32_t(*weights)[4][16] = h->weights;
    for (int g = 0; g < h->groups; g++) {
        const uint8_t *index = h->index[g];
        __m256i index01 = load(index), index23 = load(index + 32);
        __m256i other01 = load(index + 64), other23 = load(index + 96);
        __m256i high[3] = {zero, zero, zero}, low[3] = {rounding, rounding, rounding};
        const int *base = h->base[g];
        for (int q = 0; q < h->quads; q++, weights++) {
            __m256i high01 = load((*weights)[0]), low01 = load((*weights)[1]);
            __m256i high23 = load((*weights)[2]), low23 = load((*weights)[3]);
            for (int p = 0; p < 3; p++) {
                const uint8_t *at = in[p] + 4 * q;
                __m256i v01, v23;
                if (reach == FAR) {
                    __m256i v = _mm256_i32gather_epi32((const int *)(at + base[0]), index01, 1);
                    v01 = _mm256_shuffle_epi8(v, own01);
                    v23 = _mm256_shuffle_epi8(v, own23);
                } else {
                    __m256i v = load_two(at + base[0], at + base[2]);
                    v01 = _mm256_shuffle_epi8(v, index01);
                    v23 = _mm256_shuffle_epi8(v, index23);
                }
                if (reach == MIDDLE) {
                    __m256i v = load_two(at + base[1], at + base[3]);
                    v01 = _mm256_or_si256(v01, _mm256_shuffle_epi8(v, other01));
                    v23 = _mm256_or_si256(v23, _mm256_shuffle_epi8(v, other23));
                }
                add(&high[p], &low[p], v01, high01, low01);
                add(&high[p], &low[p], v23, high23, low23);
            }
        }
        for (int p = 0; p < 3; p++) {
            __m256i sum = _mm256_packs_epi32(whole(high[p], low[p]), zero);
            sum = _mm256_permute4x64_epi64(_mm256_packus_epi16(sum, zero), 0x08);
            __m128i bytes = _mm256_castsi256_si128(sum);
            _mm_storel_epi64(
                (__m128i *)(out[p] + 8L * g), _mm_shuffle_epi32(bytes, _MM_SHUFFLE(3, 3, 2, 0)));
        }
    }
}

TARGET static void horizontal(
    const Horizontal *h, const uint8_t *const in[3], uint8_t *const out[3]) {
    if (h->reach == NEAR) row(h, in, out, NEAR);
    else if (h->reach == MIDDLE) row(h, in, out, MIDDLE);
    else row(h, in, out, FAR);
}

TARGET static void vertical(
    const int32_t (*weights)[4], int quads, const uint8_t *const *rows, long n, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256();
    for (long x = 0; x < n; x += 32) {
        __m256i high[4] = {zero, zero, zero, zero}, low[4];
        for (int i = 0; i < 4; i++) low[i] = _mm256_set1_epi32(ROUNDING);
        for (int r = 0; r < 4 * quads; r += 2) {
            /* Bytes of two rows side by side, widened. The unpacking works within 128 bits, and so
             * does the packing below, which puts the columns back in order. */
            __m256i r0 = load(rows[r] + x), r1 = load(rows[r + 1] + x);
            __m256i left = _mm256_unpacklo_epi8(r0, r1), right = _mm256_unpackhi_epi8(r0, r1);
            __m256i v[4] = {
                _mm256_unpacklo_epi8(left, zero), _mm256_unpackhi_epi8(left, zero),
                _mm256_unpacklo_epi8(right, zero), _mm256_unpackhi_epi8(right, zero)};
            __m256i by_high = _mm256_set1_epi32(weights[r / 4][r % 4]);
            __m256i by_low = _mm256_set1_epi32(weights[r / 4][r % 4 + 1]);
            for (int i = 0; i < 4; i++) add(&high[i], &low[i], v[i], by_high, by_low);
        }
        for (int i = 0; i < 4; i++) high[i] = whole(high[i], low[i]);
        __m256i left = _mm256_packs_epi32(high[0], high[1]);
        __m256i right = _mm256_packs_epi32(high[2], high[3]);
        _mm256_storeu_si256((__m256i *)(out + x), _mm256_packus_epi16(left, right));
    }
}

const Kernel AVX2 = {
    "avx2", supported, 8, pack_horizontal, pack_quad, deinterleave, horizontal, vertical};
#endif
