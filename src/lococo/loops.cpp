// What decoding and compressing compute, for a CPU with AVX-512: everything is read from memory once, and what follows is
// asked for meanwhile. All tensors are contiguous.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr long BYTES = 64;     // of a register
constexpr long AHEAD = 2048;   // bytes from what is used to what is asked for
constexpr long ROWS = 32;      // of a matrix, that all rows meet while they are in a near cache
constexpr long ENTRIES = 64;   // that all queries of a group meet while they are in a near cache
constexpr long PARTS = 16;     // among which threads share what there is to attend to, at least
constexpr long MAP = 96;       // rows of a map of attention, of which a thread makes at least so many
constexpr int HIGH = 6;        // rows of a map that are made side by side,
constexpr int WIDE = 4;        // in so many registers of each

const __m512i PLACES = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);

struct Float32 {
    using Number = float;
    using Numbers = __m512;
    static constexpr int WIDTH = 1;  // numbers in the place of a float32
    static INLINE Numbers everywhere(const float* number) { return _mm512_set1_ps(*number); }
    static INLINE __m512 add(__m512 sums, Numbers a, Numbers b) { return _mm512_fmadd_ps(a, b, sums); }
    static INLINE void mix(__m512* sums, Numbers numbers, __m512 weight) {
        sums[0] = _mm512_fmadd_ps(numbers, weight, sums[0]);
    }
    static INLINE float at(const float* sums, int i) { return sums[i]; }
};

#ifdef __AVX512BF16__
struct Bfloat16 {
    using Number = uint16_t;
    using Numbers = __m512bh;
    static constexpr int WIDTH = 2;
    static INLINE Numbers everywhere(const uint16_t* pair) {
        int both;
        memcpy(&both, pair, sizeof(both));
        return (__m512bh)_mm512_set1_epi32(both);
    }
    static INLINE __m512 add(__m512 sums, Numbers a, Numbers b) { return _mm512_dpbf16_ps(sums, a, b); }
    // Of two numbers that lie side by side the first goes into the first register, the second into the second.
    static INLINE void mix(__m512* sums, Numbers numbers, __m512 weight) {
        const __m512i bits = (__m512i)numbers;
        const __m512i second = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000));
        sums[0] = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(bits, 16), weight, sums[0]);
        sums[1] = _mm512_fmadd_ps((__m512)second, weight, sums[1]);
    }
    static INLINE float at(const float* sums, int i) { return sums[i % 2 * 16 + i / 2]; }
};
#endif

template <class Kind>
constexpr long STEP = BYTES / sizeof(typename Kind::Number);  // numbers of a register

template <class Kind>
INLINE typename Kind::Numbers load(const typename Kind::Number* from) {
    typename Kind::Numbers numbers;
    memcpy(&numbers, from, BYTES);
    return numbers;
}

template <class Kind>
INLINE typename Kind::Numbers load(const typename Kind::Number* from, long count) {
    typename Kind::Numbers numbers = {};
    memcpy(&numbers, from, count * sizeof(*from));
    return numbers;
}

// The sums of eight registers, each in its place.
INLINE __m256 totals(const __m512* sums) {
    __m256 eight[8], four[4], two[2];
    for (int i = 0; i < 8; i++)
        eight[i] = _mm256_add_ps(_mm512_castps512_ps256(sums[i]), _mm512_extractf32x8_ps(sums[i], 1));
    for (int i = 0; i < 4; i++)
        four[i] = _mm256_add_ps(_mm256_permute2f128_ps(eight[i], eight[i + 4], 0x20),
                                _mm256_permute2f128_ps(eight[i], eight[i + 4], 0x31));
    for (int i = 0; i < 2; i++)
        two[i] = _mm256_add_ps(_mm256_shuffle_ps(four[2 * i], four[2 * i + 1], 0x44),
                               _mm256_shuffle_ps(four[2 * i], four[2 * i + 1], 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x88), _mm256_shuffle_ps(two[0], two[1], 0xdd));
}

// e^x for x up to 0, to the last but one bit of a float32; Cephes' polynomial. What is no number stays none, which the
// order of the maximum's operands decides.
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-120.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
    __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(factor));
    sum = _mm512_add_ps(_mm512_fmadd_ps(sum, _mm512_mul_ps(x, x), x), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

// y (R, n) = x (R, d) weight (C, d)^T; at most eight sums.
template <class Kind, int R, int C>
void tile(const typename Kind::Number* x, const typename Kind::Number* weight, float* y, long n, long d) {
    using Numbers = typename Kind::Numbers;
    __m512 sums[8] = {};
    long i = 0;
    for (; i + STEP<Kind> <= d; i += STEP<Kind>) {
        Numbers weights[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) {
            __builtin_prefetch(reinterpret_cast<const char*>(weight + c * d + i) + AHEAD);
            weights[c] = load<Kind>(weight + c * d + i);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Numbers row = load<Kind>(x + r * d + i);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sums[r * C + c] = Kind::add(sums[r * C + c], row, weights[c]);
        }
    }
    if (i < d)
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++)
                sums[r * C + c] = Kind::add(sums[r * C + c], load<Kind>(x + r * d + i, d - i),
                                            load<Kind>(weight + c * d + i, d - i));
    float total[8];
    _mm256_storeu_ps(total, totals(sums));
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) y[r * n + c] = total[r * C + c];
}

// Columns of y, several at a time where there are few rows, so that no sum waits for itself.
template <class Kind, int R>
void columns(const typename Kind::Number* x, const typename Kind::Number* weight, float* y, long n, long d, long count) {
    constexpr int TOGETHER = R > 4 ? 1 : R > 2 ? 2 : R > 1 ? 4 : 8;
    long c = 0;
    for (; c + TOGETHER <= count; c += TOGETHER) tile<Kind, R, TOGETHER>(x, weight + c * d, y + c, n, d);
    for (; c < count; c++) tile<Kind, R, 1>(x, weight + c * d, y + c, n, d);
}

template <class Kind>
void product(const typename Kind::Number* x, const typename Kind::Number* weight, float* y, long rows, long n, long d,
             int threads) {
    const long blocks = (n + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; block++) {
        const long first = block * ROWS, count = n - first < ROWS ? n - first : ROWS;
        const auto* weights = weight + first * d;
        for (long row = 0; row < rows; row += 8) {
            const auto* from = x + row * d;
            float* to = y + row * n + first;
            switch (rows - row) {
                case 1: columns<Kind, 1>(from, weights, to, n, d, count); break;
                case 2: columns<Kind, 2>(from, weights, to, n, d, count); break;
                case 3: columns<Kind, 3>(from, weights, to, n, d, count); break;
                case 4: columns<Kind, 4>(from, weights, to, n, d, count); break;
                case 5: columns<Kind, 5>(from, weights, to, n, d, count); break;
                case 6: columns<Kind, 6>(from, weights, to, n, d, count); break;
                case 7: columns<Kind, 7>(from, weights, to, n, d, count); break;
                default: columns<Kind, 8>(from, weights, to, n, d, count);
            }
        }
    }
}

// What a query has seen: its largest logit, the sum of e^(logit - largest), and the values mixed by these, registers
// behind each other.
template <class Kind, int STEPS>
struct Seen {
    float most, total, mixed[STEPS * STEP<Kind>];
};

// Logits of eight entries at most, those that are not there -inf.
template <class Kind, int STEPS>
INLINE void logits(const typename Kind::Numbers* query, const typename Kind::Number* keys, const float* bias, float scale,
                   long count, float* to) {
    __m512 sums[8] = {};
#pragma GCC unroll 8
    for (int e = 0; e < 8; e++) {
        const auto* key = keys + (e < count ? e : count - 1) * STEPS * STEP<Kind>;
#pragma GCC unroll 16
        for (int i = 0; i < STEPS; i++) sums[e] = Kind::add(sums[e], query[i], load<Kind>(key + i * STEP<Kind>));
    }
    float added[8];
    for (int e = 0; e < 8; e++) added[e] = -INFINITY;
    memcpy(added, bias, (count < 8 ? count : 8) * sizeof(float));
    _mm256_storeu_ps(to, _mm256_fmadd_ps(totals(sums), _mm256_set1_ps(scale), _mm256_loadu_ps(added)));
}

// Let g queries (g d) of a group attend to entries: keys and values (n d), bias (n).
template <class Kind, int STEPS>
void attend(const typename Kind::Number* queries, const typename Kind::Number* keys, const typename Kind::Number* values,
            const float* bias, long g, long n, float scale, Seen<Kind, STEPS>* seen) {
    constexpr long d = STEPS * STEP<Kind>;
    for (long begin = 0; begin < n; begin += ENTRIES) {
        const long count = n - begin < ENTRIES ? n - begin : ENTRIES;
        bool hidden = true;
        for (long e = begin; e < begin + count; e++) hidden = hidden && bias[e] == -INFINITY;
        if (hidden) continue;
        for (long r = 0; r < g; r++) {
            typename Kind::Numbers query[STEPS];
            for (int i = 0; i < STEPS; i++) query[i] = load<Kind>(queries + r * d + i * STEP<Kind>);
            alignas(64) float weights[ENTRIES];
            for (long e = 0; e < count; e += 8)
                logits<Kind, STEPS>(query, keys + (begin + e) * d, bias + begin + e, scale, count - e, weights + e);
            for (long e = (count + 7) / 8 * 8; e < ENTRIES; e++) weights[e] = -INFINITY;
            __m512 most = _mm512_set1_ps(seen[r].most);
            for (long e = 0; e < ENTRIES; e += 16) most = _mm512_max_ps(most, _mm512_load_ps(weights + e));
            const float largest = _mm512_reduce_max_ps(most);
            __m512 sum = _mm512_setzero_ps();
            for (long e = 0; e < ENTRIES; e += 16) {
                const __m512 each = exponential(_mm512_sub_ps(_mm512_load_ps(weights + e), _mm512_set1_ps(largest)));
                _mm512_store_ps(weights + e, each);
                sum = _mm512_add_ps(sum, each);
            }
            const float before = std::exp(seen[r].most - largest);
            seen[r].most = largest;
            seen[r].total = seen[r].total * before + _mm512_reduce_add_ps(sum);
            __m512 mixed[STEPS * Kind::WIDTH];
            for (int i = 0; i < STEPS * Kind::WIDTH; i++)
                mixed[i] = _mm512_mul_ps(_mm512_loadu_ps(&seen[r].mixed[16 * i]), _mm512_set1_ps(before));
            for (long e = 0; e < count; e++)
#pragma GCC unroll 16
                for (int i = 0; i < STEPS; i++)
                    Kind::mix(mixed + i * Kind::WIDTH, load<Kind>(values + (begin + e) * d + i * STEP<Kind>),
                              _mm512_set1_ps(weights[e]));
            for (int i = 0; i < STEPS * Kind::WIDTH; i++) _mm512_storeu_ps(&seen[r].mixed[16 * i], mixed[i]);
        }
    }
}

// y (heads g d) of queries (heads g d), keys and values (heads n d) and bias (heads n); heads of all rows.
template <class Kind, int STEPS>
void attention(const typename Kind::Number* queries, const typename Kind::Number* keys, const typename Kind::Number* values,
               const float* bias, float* y, long heads, long g, long n, float scale, int threads) {
    constexpr long d = STEPS * STEP<Kind>;
    const long splits = (PARTS + heads - 1) / heads, length = (n + splits - 1) / splits;
    std::vector<Seen<Kind, STEPS>> seen(heads * splits * g);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long part = 0; part < heads * splits; part++) {
        const long head = part / splits, first = part % splits * length, last = first + length < n ? first + length : n;
        const long from = (head * n + first) * d;
        for (long r = 0; r < g; r++) seen[part * g + r].most = -INFINITY;
        attend<Kind, STEPS>(queries + head * g * d, keys + from, values + from, bias + head * n + first, g, last - first,
                            scale, &seen[part * g]);
    }
    for (long head = 0; head < heads; head++)
        for (long r = 0; r < g; r++) {
            float most = -INFINITY, total = 0, *to = y + (head * g + r) * d;
            for (long s = 0; s < splits; s++) most = std::fmax(most, seen[(head * splits + s) * g + r].most);
            std::memset(to, 0, d * sizeof(float));
            for (long s = 0; s < splits; s++) {
                const Seen<Kind, STEPS>& each = seen[(head * splits + s) * g + r];
                const float share = each.total > 0 ? std::exp(each.most - most) : 0;
                total += share * each.total;
                for (long i = 0; i < STEPS; i++)
                    for (int j = 0; j < STEP<Kind>; j++)
                        to[i * STEP<Kind> + j] += share * Kind::at(&each.mixed[i * STEP<Kind>], j);
            }
            for (long i = 0; i < d; i++) to[i] /= total;
        }
}

template <class Kind>
void attention(const typename Kind::Number* queries, const typename Kind::Number* keys, const typename Kind::Number* values,
               const float* bias, float* y, long heads, long g, long n, long d, float scale, int threads) {
    if (heads == 0) return;
    switch (d / STEP<Kind>) {
        case 1: attention<Kind, 1>(queries, keys, values, bias, y, heads, g, n, scale, threads); break;
        case 2: attention<Kind, 2>(queries, keys, values, bias, y, heads, g, n, scale, threads); break;
        case 3: attention<Kind, 3>(queries, keys, values, bias, y, heads, g, n, scale, threads); break;
        case 4: attention<Kind, 4>(queries, keys, values, bias, y, heads, g, n, scale, threads); break;
        case 6: attention<Kind, 6>(queries, keys, values, bias, y, heads, g, n, scale, threads); break;
        case 8: attention<Kind, 8>(queries, keys, values, bias, y, heads, g, n, scale, threads); break;
    }
}

// Keys (n d) so that those of 16 entries which meet the same numbers of a query lie side by side: (d / WIDTH, width, WIDTH).
template <class Kind>
std::vector<typename Kind::Number> packed(const typename Kind::Number* keys, long n, long width, long d) {
    const long lanes = d / Kind::WIDTH;
    std::vector<typename Kind::Number> to(width * d);
    const __m512i apart = _mm512_mullo_epi32(PLACES, _mm512_set1_epi32(lanes));
    for (long e = 0; e < n; e += 16) {
        const __mmask16 there = _mm512_cmplt_epi32_mask(PLACES, _mm512_set1_epi32(n - e < 16 ? n - e : 16));
        for (long i = 0; i < lanes; i++) {
            const auto* from = keys + e * d + i * Kind::WIDTH;
            const __m512i both = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, apart, from, 4);
            _mm512_storeu_si512(&to[(i * width + e) * Kind::WIDTH], both);
        }
    }
    return to;
}

// Logits of HIGH queries and all entries, (HIGH width), bias (width) added; entries from seen[r] on get -inf.
template <class Kind>
void map_of(const typename Kind::Number* const* queries, const typename Kind::Number* keys, const float* bias, long width,
            long d, float scale, const long* seen, float* map) {
    constexpr int W = Kind::WIDTH;
    for (long c = 0; c < width; c += 16 * WIDE) {
        __m512 sums[HIGH][WIDE] = {};
        for (long i = 0; i < d / W; i++) {
            typename Kind::Numbers key[WIDE];
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) key[j] = load<Kind>(keys + (i * width + c + 16 * j) * W);
#pragma GCC unroll 6
            for (int r = 0; r < HIGH; r++) {
                const auto query = Kind::everywhere(queries[r] + i * W);
#pragma GCC unroll 4
                for (int j = 0; j < WIDE; j++) sums[r][j] = Kind::add(sums[r][j], query, key[j]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < HIGH; r++)
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) {
                const long first = c + 16 * j, left = seen[r] - first;
                __m512 logit = _mm512_fmadd_ps(sums[r][j], _mm512_set1_ps(scale), _mm512_loadu_ps(bias + first));
                if (left < 16) {
                    const __mmask16 visible = _mm512_cmplt_epi32_mask(PLACES, _mm512_set1_epi32(left < 0 ? 0 : left));
                    logit = _mm512_mask_blend_ps(visible, _mm512_set1_ps(-INFINITY), logit);
                }
                _mm512_storeu_ps(map + r * width + first, logit);
            }
    }
}

// Add a row of logits as probabilities, times a weight, to the mass of the entries.
INLINE void add_row(float* row, long width, float weight, float* mass) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long e = 0; e < width; e += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(row + e));
    const float largest = _mm512_reduce_max_ps(most);
    for (long e = 0; e < width; e += 16) {
        const __m512 each = exponential(_mm512_sub_ps(_mm512_loadu_ps(row + e), _mm512_set1_ps(largest)));
        _mm512_storeu_ps(row + e, each);
        sum = _mm512_add_ps(sum, each);
    }
    const __m512 share = _mm512_set1_ps(weight / _mm512_reduce_add_ps(sum));
    for (long e = 0; e < width; e += 16)
        _mm512_storeu_ps(mass + e, _mm512_fmadd_ps(_mm512_loadu_ps(row + e), share, _mm512_loadu_ps(mass + e)));
}

// mass (heads n) of queries (heads, rows, d), of which row r is of query r % q; seen and weights are (heads / h, q).
template <class Kind>
void column_mass(const typename Kind::Number* keys, const float* bias, const typename Kind::Number* queries,
                 const int64_t* seen, const float* weights, float* mass, long heads, long h, long rows, long q, long n,
                 long d, float scale, int threads) {
    const long width = (n + 16 * WIDE - 1) / (16 * WIDE) * 16 * WIDE, splits = rows < MAP ? 1 : rows / MAP;
    std::vector<float> sums(heads * splits * width), biases(heads * width, -INFINITY);
    std::vector<std::vector<typename Kind::Number>> keys_of(heads);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long head = 0; head < heads; head++) {
        keys_of[head] = packed<Kind>(keys + head * n * d, n, width, d);
        memcpy(&biases[head * width], bias + head * n, n * sizeof(float));
    }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long part = 0; part < heads * splits; part++) {
        const long head = part / splits, text = head / h;
        const long first = rows * (part % splits) / splits, last = rows * (part % splits + 1) / splits;
        std::vector<float> map(HIGH * width);
        for (long row = first; row < last; row += HIGH) {
            const typename Kind::Number* from[HIGH];
            long visible[HIGH];
            for (int r = 0; r < HIGH; r++) {
                const long mine = row + r < last ? row + r : last - 1;
                from[r] = queries + (head * rows + mine) * d;
                visible[r] = seen ? seen[text * q + mine % q] : n;
            }
            map_of<Kind>(from, keys_of[head].data(), &biases[head * width], width, d, scale, visible, map.data());
            for (int r = 0; r < HIGH && row + r < last; r++)
                if (visible[r] > 0)  // a query that sees nothing gives nothing
                    add_row(&map[r * width], width, weights ? weights[text * q + (row + r) % q] : 1, &sums[part * width]);
        }
    }
    for (long head = 0; head < heads; head++)
        for (long e = 0; e < n; e++) {
            float sum = 0;
            for (long s = 0; s < splits; s++) sum += sums[(head * splits + s) * width + e];
            mass[head * n + e] = sum;
        }
}

}  // namespace

// y (rows n) = x (rows d) weight (n d)^T; y is float32.
#define PRODUCT(NAME, KIND)                                                                                       \
    extern "C" void NAME(const KIND::Number* x, const KIND::Number* weight, float* y, long rows, long n, long d,  \
                         int threads) {                                                                           \
        product<KIND>(x, weight, y, rows, n, d, threads);                                                         \
    }

// y (heads g d) = softmax(scale queries keys^T + bias) values; bias and y are float32; d fills 1, 2, 3, 4, 6 or 8 registers.
#define ATTENTION(NAME, KIND)                                                                                        \
    extern "C" void NAME(const KIND::Number* queries, const KIND::Number* keys, const KIND::Number* values,          \
                         const float* bias, float* y, long heads, long g, long n, long d, float scale, int threads) { \
        attention<KIND>(queries, keys, values, bias, y, heads, g, n, d, scale, threads);                             \
    }

// mass (heads n): what the probabilities softmax(scale queries keys^T + bias) of (heads, rows) queries add up to, each times
// its weight; a query sees the first seen entries. Seen and weights are (heads / h, q) or null; row r is of query r % q.
#define COLUMN_MASS(NAME, KIND)                                                                                      \
    extern "C" void NAME(const KIND::Number* keys, const float* bias, const KIND::Number* queries, const int64_t* seen, \
                         const float* weights, float* mass, long heads, long h, long rows, long q, long n, long d,   \
                         float scale, int threads) {                                                                 \
        column_mass<KIND>(keys, bias, queries, seen, weights, mass, heads, h, rows, q, n, d, scale, threads);        \
    }

PRODUCT(few_rows_float32, Float32)
ATTENTION(attention_float32, Float32)
COLUMN_MASS(column_mass_float32, Float32)
#ifdef __AVX512BF16__
PRODUCT(few_rows_bfloat16, Bfloat16)
ATTENTION(attention_bfloat16, Bfloat16)
COLUMN_MASS(column_mass_bfloat16, Bfloat16)
#endif
