// RelayAttention on x86 CPUs: partial attention over the segments of a work list, then fusion by log-sum-exp.
//
// Reads vLLM's paged CPU cache in place, in both of its layouts (one block of one KV head; t = token, d = head dim):
//   pairs  (vLLM "amx", bfloat16):       K[t/16][d/2][t%16][d%2],  V[d/16][t/2][d%16][t%2]
//   planes (vLLM "vec" and "vec16"):     K[d][t],                  V[t][d]
// Both are already the right-hand operand of a matrix product, so no key or value is ever repacked.
//
// Exposed through a C interface (loaded with ctypes), so that it depends on no header of torch.
// Partial outputs and log-sum-exps stay float32 until they are merged (arXiv 2402.14808, equations 5 to 7).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <omp.h>

namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kRowsPerItem = 384;   // query rows (tokens x heads per KV head) of one work item
constexpr int kKeysPerChunk = 128;  // keys between two updates of the running maximum

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Layout : int { kPlanes = 0, kPairs = 1 };

}  // namespace

// Mirrors the ctypes structure of cpu.py, field by field. Strides count elements. Segments start at block boundaries.
struct RelayArguments {
  void* out;
  const void* query;
  const void* key_cache;
  const void* value_cache;
  const int32_t* block_table;
  const int32_t* segments;          // [S, 5]
  const int32_t* slot_token;        // [P]
  const int32_t* slot_key_end;      // [P]
  const int32_t* token_slot_start;  // [T + 1]
  const int32_t* token_slots;       // [P]
  float* partial_out;               // [P, H, D]
  float* partial_lse;               // [P, H]
  float* lse;                       // [T, H] or null
  int64_t out_stride_token, out_stride_head;
  int64_t query_stride_token, query_stride_head;
  int64_t cache_stride_block, cache_stride_head;
  int64_t block_table_stride;
  int32_t num_tokens, num_segments, num_heads, num_kv_heads, head_size, block_size;
  int32_t dtype, layout;
  float scale;
};

namespace {

// ---------------------------------------------------------------------------------------------- element conversion

inline float bf16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // quiet NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <int dtype>
inline void load_floats(float* __restrict__ to, const void* from, int64_t offset, int64_t count) {
  if constexpr (dtype == kFloat32) {
    std::memcpy(to, static_cast<const float*>(from) + offset, count * sizeof(float));
  } else if constexpr (dtype == kFloat16) {
    const _Float16* source = static_cast<const _Float16*>(from) + offset;
    int64_t i = 0;
#if defined(__AVX512F__)  // GCC leaves the plain loop scalar
    for (; i + 16 <= count; i += 16)
      _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
#endif
    for (; i < count; ++i) to[i] = static_cast<float>(source[i]);
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(from) + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(source[i]);
  }
}

inline void store_floats(int dtype, void* to, int64_t offset, const float* __restrict__ from, int64_t count) {
  if (dtype == kFloat32) {
    std::memcpy(static_cast<float*>(to) + offset, from, count * sizeof(float));
  } else if (dtype == kFloat16) {
    _Float16* target = static_cast<_Float16*>(to) + offset;
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                          _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; ++i) target[i] = static_cast<_Float16>(from[i]);
  } else {
    uint16_t* target = static_cast<uint16_t*>(to) + offset;
    for (int64_t i = 0; i < count; ++i) target[i] = float_to_bf16(from[i]);
  }
}

// ----------------------------------------------------------------------------------------------- softmax of one row

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
// 2^x for x <= 0 (also -inf, giving 0). Minimax polynomials fitted for this file; relative error 2e-9 and 8e-5.
template <bool precise>
inline __m512 exp2_vector(__m512 x) {
  __m512 p;
  if constexpr (precise) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    p = _mm512_set1_ps(0x1.41d334p-13f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.5f456ap-10f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3b2dbcp-7f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c6aed4p-5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebfbdap-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e430p-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
  } else {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    p = _mm512_set1_ps(0x1.3f96a4p-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.cefc4cp-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.64444cp-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.fff632p-1f));
    return _mm512_scalef_ps(p, x);  // scalef takes the floor of its exponent
  }
}
#else
// The same for compilers that vectorise plain loops: no calls, no branches. 2^-127 and less are 0; NaN stays NaN.
inline float exp2_lane(float x) {
  constexpr float kToInteger = 0x1.8p23f;  // x + this - this is x rounded, and the low bits of the sum are that integer
  x = x < -127.0f ? -127.0f : x;
  const float shifted = x + kToInteger;
  const float f = x - (shifted - kToInteger);
  float p = 0x1.41d334p-13f;
  p = p * f + 0x1.5f456ap-10f;
  p = p * f + 0x1.3b2dbcp-7f;
  p = p * f + 0x1.c6aed4p-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// Eight partial results, because a compiler may not reorder a sum of floats by itself.
inline float highest_of(const float* values, int count) {
  float lanes[8];
  for (float& lane : lanes) lane = kMinusInf;
  int i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] = lanes[j] < values[i + j] ? values[i + j] : lanes[j];
  float highest = kMinusInf;
  for (; i < count; ++i) highest = std::max(highest, values[i]);
  for (float lane : lanes) highest = std::max(highest, lane);
  return highest;
}

inline float sum_of(const float* values, int count) {
  float lanes[8] = {};
  int i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += values[i + j];
  float sum = 0.0f;
  for (; i < count; ++i) sum += values[i];
  for (float lane : lanes) sum += lane;
  return sum;
}
#endif

// One row of scores -> probabilities relative to the running maximum, in base 2.
// scores: [count], count a multiple of 16, columns >= valid are ignored and get probability 0.
// Writes float or bfloat16 probabilities; returns the factor by which what was accumulated before must be scaled.
struct RowState {
  float maximum;  // of scale * log2(e) * score
  float sum;
};

inline bool has_nan(const float* scores, int count) {
  for (int i = 0; i < count; ++i)
    if (scores[i] != scores[i]) return true;
  return false;
}

// No visible score is above -inf: probabilities are zero, unless a score is NaN, which must reach the output.
template <bool to_bf16>
inline float softmax_of_nothing(RowState& state, const float* scores, void* probabilities, int count, int valid) {
  std::memset(probabilities, 0, count * (to_bf16 ? 2 : 4));
  if (has_nan(scores, valid)) state.sum = std::numeric_limits<float>::quiet_NaN();
  return 1.0f;
}

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
// A whole chunk of visible keys, held in registers between the two passes.
template <bool to_bf16, bool precise>
inline float softmax_full_row(RowState& state, const float* __restrict__ scores, void* probabilities,
                              float scale_log2) {
  constexpr int V = kKeysPerChunk / 16;
  __m512 x[V];
  for (int v = 0; v < V; ++v) x[v] = _mm512_loadu_ps(scores + v * 16);
  __m512 highest[V];
  for (int v = 0; v < V; ++v) highest[v] = x[v];
  for (int step = V / 2; step > 0; step /= 2)
    for (int v = 0; v < step; ++v) highest[v] = _mm512_max_ps(highest[v], highest[v + step]);
  const float maximum = std::max(state.maximum, _mm512_reduce_max_ps(highest[0]) * scale_log2);
  if (maximum == kMinusInf)
    return softmax_of_nothing<to_bf16>(state, scores, probabilities, kKeysPerChunk, kKeysPerChunk);
  const float rescale = state.maximum == maximum ? 1.0f : std::exp2(state.maximum - maximum);
  const __m512 factor = _mm512_set1_ps(scale_log2), shift = _mm512_set1_ps(maximum);
  for (int v = 0; v < V; ++v) x[v] = exp2_vector<precise>(_mm512_fmsub_ps(x[v], factor, shift));
  if constexpr (to_bf16) {
#if defined(__AVX512BF16__)
    for (int v = 0; v < V; v += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh(x[v + 1], x[v]);
      std::memcpy(static_cast<uint16_t*>(probabilities) + v * 16, &both, 64);
    }
#else
    alignas(64) float lanes[16];
    for (int v = 0; v < V; ++v) {
      _mm512_store_ps(lanes, x[v]);
      for (int lane = 0; lane < 16; ++lane)
        static_cast<uint16_t*>(probabilities)[v * 16 + lane] = float_to_bf16(lanes[lane]);
    }
#endif
  } else {
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(static_cast<float*>(probabilities) + v * 16, x[v]);
  }
  for (int step = V / 2; step > 0; step /= 2)
    for (int v = 0; v < step; ++v) x[v] = _mm512_add_ps(x[v], x[v + step]);
  state.sum = state.sum * rescale + _mm512_reduce_add_ps(x[0]);
  state.maximum = maximum;
  return rescale;
}
#endif

template <bool to_bf16, bool precise>
inline float softmax_row(RowState& state, float* __restrict__ scores, void* probabilities, int count, int valid,
                         float scale_log2) {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
  if (valid == kKeysPerChunk) return softmax_full_row<to_bf16, precise>(state, scores, probabilities, scale_log2);
  const __m512 minus_inf = _mm512_set1_ps(kMinusInf);
  __m512 highest = minus_inf;
  int i = 0;
  for (; i + 16 <= valid; i += 16) highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + i));
  if (i < valid) {
    const __mmask16 mask = static_cast<__mmask16>((1u << (valid - i)) - 1u);
    highest = _mm512_mask_max_ps(highest, mask, highest, _mm512_loadu_ps(scores + i));
  }
  const float maximum = std::max(state.maximum, _mm512_reduce_max_ps(highest) * scale_log2);
  if (maximum == kMinusInf) return softmax_of_nothing<to_bf16>(state, scores, probabilities, count, valid);
  const float rescale = state.maximum == maximum ? 1.0f : std::exp2(state.maximum - maximum);
  const __m512 factor = _mm512_set1_ps(scale_log2), shift = _mm512_set1_ps(maximum);
  __m512 sum = _mm512_setzero_ps();
  for (i = 0; i < count; i += 16) {
    __m512 p;
    if (i + 16 <= valid) {
      p = exp2_vector<precise>(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factor, shift));
    } else if (i < valid) {
      const __mmask16 mask = static_cast<__mmask16>((1u << (valid - i)) - 1u);
      const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factor, shift);
      p = _mm512_maskz_mov_ps(mask, exp2_vector<precise>(_mm512_mask_mov_ps(minus_inf, mask, x)));
    } else {
      p = _mm512_setzero_ps();
    }
    sum = _mm512_add_ps(sum, p);
    if constexpr (to_bf16) {
#if defined(__AVX512BF16__)
      const __m256bh half = _mm512_cvtneps_pbh(p);
      std::memcpy(static_cast<uint16_t*>(probabilities) + i, &half, 32);
#else
      alignas(64) float lanes[16];
      _mm512_store_ps(lanes, p);
      for (int lane = 0; lane < 16; ++lane)
        static_cast<uint16_t*>(probabilities)[i + lane] = float_to_bf16(lanes[lane]);
#endif
    } else {
      _mm512_storeu_ps(static_cast<float*>(probabilities) + i, p);
    }
  }
  state.sum = state.sum * rescale + _mm512_reduce_add_ps(sum);
#else
  const float maximum = std::max(state.maximum, highest_of(scores, valid) * scale_log2);
  if (maximum == kMinusInf) return softmax_of_nothing<to_bf16>(state, scores, probabilities, count, valid);
  const float rescale = state.maximum == maximum ? 1.0f : std::exp2(state.maximum - maximum);
  for (int i = 0; i < valid; ++i) scores[i] = exp2_lane(scores[i] * scale_log2 - maximum);
  for (int i = valid; i < count; ++i) scores[i] = 0.0f;
  const float sum = sum_of(scores, count);
  if constexpr (to_bf16) {
    for (int i = 0; i < count; ++i) static_cast<uint16_t*>(probabilities)[i] = float_to_bf16(scores[i]);
  } else {
    std::memcpy(probabilities, scores, count * sizeof(float));
  }
  state.sum = state.sum * rescale + sum;
#endif
  state.maximum = maximum;
  return rescale;
}

inline void scale_row(float* __restrict__ row, float factor, int count) {
  for (int i = 0; i < count; ++i) row[i] *= factor;
}

// ------------------------------------------------------------------------------------------- one item of the work

struct Item {
  int segment, kv_head, slot_begin, slot_end;
};

// Buffers of one thread; every size is bounded by kRowsPerItem, kKeysPerChunk, the head size and the block size.
struct Scratch {
  float* accumulator;     // [rows, D]
  float* scores;          // [32, kKeysPerChunk]
  float* query;           // [rows, D] floats, or the same bytes as bfloat16
  void* probabilities;    // [32, kKeysPerChunk]
  float* key_plane;       // [D, block] floats, or [D/2, block, 2] bfloat16 (planes layout of 16-bit caches)
  float* value_plane;     // [block, D]
  uint16_t* value_tail;   // [D/16][16][16][2], the last 32 keys of a ragged end
  RowState* rows;
  int32_t* row_key_end;
};

inline int heads_per_kv(const RelayArguments& a) { return a.num_heads / a.num_kv_heads; }

// Writes what an item found: the final output where a token has this one slot, else the slot's partial.
inline void finish_rows(const RelayArguments& a, const Item& item, const Scratch& s) {
  const int group = heads_per_kv(a), D = a.head_size;
  int row = 0;
  for (int slot = item.slot_begin; slot < item.slot_end; ++slot) {
    const int token = a.slot_token[slot];
    const bool only_slot = a.token_slot_start[token + 1] - a.token_slot_start[token] == 1;
    for (int g = 0; g < group; ++g, ++row) {
      const int head = item.kv_head * group + g;
      float* result = s.accumulator + static_cast<int64_t>(row) * D;
      const RowState& state = s.rows[row];
      const bool saw_nothing = state.sum == 0.0f;  // false for NaN, which goes on to the output
      scale_row(result, saw_nothing ? 0.0f : 1.0f / state.sum, D);
      const float lse = saw_nothing ? kMinusInf : (state.maximum + std::log2(state.sum)) * kLn2;
      if (only_slot) {
        store_floats(a.dtype, a.out, token * a.out_stride_token + head * a.out_stride_head, result, D);
        if (a.lse) a.lse[static_cast<int64_t>(token) * a.num_heads + head] = lse;
      } else {
        const int64_t partial = static_cast<int64_t>(slot) * a.num_heads + head;
        std::memcpy(a.partial_out + partial * D, result, D * sizeof(float));
        a.partial_lse[partial] = lse;
      }
    }
  }
}

// ------------------------------------------------------------------------------ planes layout: any dtype, float math

// A tile and its operands must fit the registers: 32 of 16 floats, or 16 of 8.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTallTile = 8;
#else
constexpr int kLanes = 8, kTallTile = 6;
#endif
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4)));

// c[rows, columns] (+)= a[rows, depth] x b[depth, columns]; a tile of R rows by kLanes * V columns in registers.
template <int R, int V>
inline void tile_product(float* __restrict__ c, int64_t ldc, const float* __restrict__ a, int64_t lda,
                         const float* __restrict__ b, int64_t ldb, int depth, bool accumulate) {
  Vector acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      acc[r][v] = accumulate ? *reinterpret_cast<const Vector*>(c + r * ldc + v * kLanes) : Vector{};
  for (int k = 0; k < depth; ++k) {
    Vector right[V];
    for (int v = 0; v < V; ++v) right[v] = *reinterpret_cast<const Vector*>(b + k * ldb + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const float left = a[r * lda + k];
      for (int v = 0; v < V; ++v) acc[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(c + r * ldc + v * kLanes) = acc[r][v];
}

template <int V>
inline void rows_product(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int rows,
                         int depth, bool accumulate) {
  int r = 0;
  for (; r + kTallTile <= rows; r += kTallTile)
    tile_product<kTallTile, V>(c + r * ldc, ldc, a + r * lda, lda, b, ldb, depth, accumulate);
  for (; r + 3 <= rows; r += 3)
    tile_product<3, V>(c + r * ldc, ldc, a + r * lda, lda, b, ldb, depth, accumulate);
  for (; r < rows; ++r) tile_product<1, V>(c + r * ldc, ldc, a + r * lda, lda, b, ldb, depth, accumulate);
}

// columns: a multiple of 16.
void product(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int rows, int columns,
             int depth, bool accumulate) {
  int n = 0;
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes)
    rows_product<2>(c + n, ldc, a, lda, b + n, ldb, rows, depth, accumulate);
  if (n < columns) rows_product<1>(c + n, ldc, a, lda, b + n, ldb, rows, depth, accumulate);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// Scores of bfloat16 at twice the pace of float products: two dimensions an instruction, exact products, float sums.
constexpr bool kHasPairProducts = true;

// K[d][t] -> [d/2][t][2], the right-hand operand of a pair product; `keys` and `stride` are multiples of 16.
void interleave_dims(uint16_t* __restrict__ to, const uint16_t* __restrict__ from, int dims, int keys, int stride) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; ++i) order[2 * i] = static_cast<uint16_t>(i), order[2 * i + 1] = static_cast<uint16_t>(16 + i);
  const __m512i index = _mm512_load_si512(order);
  for (int d = 0; d < dims; d += 2)
    for (int t = 0; t < keys; t += 16) {
      const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + d * stride + t));
      const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + (d + 1) * stride + t));
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
      _mm512_storeu_si512(to + d * stride + 2 * t, _mm512_permutexvar_epi16(index, both));
    }
}

inline __m512bh as_pairs(__m512i bits) {
  __m512bh result;
  std::memcpy(&result, &bits, 64);
  return result;
}

// c[R, 16 * V] = a[R, 2 * pairs] x b[pairs, 16 * V, 2]; ldb counts elements between two pairs of dimensions.
template <int R, int V>
inline void pair_tile(float* __restrict__ c, int64_t ldc, const uint16_t* __restrict__ a, int64_t lda,
                      const uint16_t* __restrict__ b, int64_t ldb, int pairs) {
  __m512 acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int k = 0; k < pairs; ++k) {
    __m512bh right[V];
    for (int v = 0; v < V; ++v) right[v] = as_pairs(_mm512_loadu_si512(b + k * ldb + v * 32));
    for (int r = 0; r < R; ++r) {
      int32_t left;
      std::memcpy(&left, a + r * lda + 2 * k, 4);
      const __m512bh pair = as_pairs(_mm512_set1_epi32(left));
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], pair, right[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * ldc + v * 16, acc[r][v]);
}

template <int V>
inline void pair_rows(float* c, int64_t ldc, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int rows,
                      int pairs) {
  int r = 0;
  for (; r + 8 <= rows; r += 8) pair_tile<8, V>(c + r * ldc, ldc, a + r * lda, lda, b, ldb, pairs);
  for (; r + 3 <= rows; r += 3) pair_tile<3, V>(c + r * ldc, ldc, a + r * lda, lda, b, ldb, pairs);
  for (; r < rows; ++r) pair_tile<1, V>(c + r * ldc, ldc, a + r * lda, lda, b, ldb, pairs);
}

// columns: a multiple of 16.
void pair_product(float* c, int64_t ldc, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int rows,
                  int columns, int depth) {
  int n = 0;
  for (; n + 32 <= columns; n += 32) pair_rows<2>(c + n, ldc, a, lda, b + 2 * n, ldb, rows, depth / 2);
  if (n < columns) pair_rows<1>(c + n, ldc, a, lda, b + 2 * n, ldb, rows, depth / 2);
}
#else
constexpr bool kHasPairProducts = false;
void interleave_dims(uint16_t*, const uint16_t*, int, int, int) {}
void pair_product(float*, int64_t, const uint16_t*, int64_t, const uint16_t*, int64_t, int, int, int) {}
#endif

template <int dtype>
void attend_planes(const RelayArguments& a, const Item& item, const Scratch& s) {
  const int32_t* segment = a.segments + item.segment * 5;
  const int32_t* blocks = a.block_table + segment[0] * a.block_table_stride;
  const int group = heads_per_kv(a), D = a.head_size, B = a.block_size;
  const int num_rows = (item.slot_end - item.slot_begin) * group;
  const float scale_log2 = a.scale * kLog2e;
  constexpr bool in_pairs = kHasPairProducts && dtype == kBFloat16;
  uint16_t* query_pairs = reinterpret_cast<uint16_t*>(s.query);
  uint16_t* key_pairs = reinterpret_cast<uint16_t*>(s.key_plane);

  int last_key = segment[1], row = 0;
  for (int slot = item.slot_begin; slot < item.slot_end; ++slot) {
    last_key = std::max(last_key, a.slot_key_end[slot]);
    for (int g = 0; g < group; ++g, ++row) {
      const int head = item.kv_head * group + g;
      const int64_t from = a.slot_token[slot] * a.query_stride_token + head * a.query_stride_head;
      if constexpr (in_pairs) {
        std::memcpy(query_pairs + static_cast<int64_t>(row) * D, static_cast<const uint16_t*>(a.query) + from, D * 2);
      } else {
        load_floats<dtype>(s.query + static_cast<int64_t>(row) * D, a.query, from, D);
      }
      s.rows[row] = RowState{kMinusInf, 0.0f};
      s.row_key_end[row] = a.slot_key_end[slot];
    }
  }
  std::memset(s.accumulator, 0, static_cast<int64_t>(num_rows) * D * sizeof(float));

  for (int block_start = segment[1]; block_start < last_key; block_start += B) {
    const int64_t at =
        static_cast<int64_t>(blocks[block_start / B]) * a.cache_stride_block + item.kv_head * a.cache_stride_head;
    const int used = std::min(B, last_key - block_start);
    const int used_16 = (used + 15) / 16 * 16;
    const float *keys, *values;
    if constexpr (dtype == kFloat32) {
      keys = static_cast<const float*>(a.key_cache) + at;
      values = static_cast<const float*>(a.value_cache) + at;
    } else {
      if constexpr (in_pairs) {
        interleave_dims(key_pairs, static_cast<const uint16_t*>(a.key_cache) + at, D, used_16, B);
      } else {
        for (int d = 0; d < D; ++d) load_floats<dtype>(s.key_plane + d * B, a.key_cache, at + d * B, used_16);
      }
      load_floats<dtype>(s.value_plane, a.value_cache, at, static_cast<int64_t>(used) * D);
      keys = s.key_plane;
      values = s.value_plane;
    }
    for (int chunk = 0; chunk < used; chunk += kKeysPerChunk) {
      const int count = std::min(kKeysPerChunk, used - chunk);
      const int count_16 = (count + 15) / 16 * 16;
      for (int r0 = 0; r0 < num_rows; r0 += 32) {
        const int rows = std::min(32, num_rows - r0);
        if constexpr (in_pairs) {
          pair_product(s.scores, kKeysPerChunk, query_pairs + static_cast<int64_t>(r0) * D, D, key_pairs + 2 * chunk,
                       2 * B, rows, count_16, D);
        } else {
          product(s.scores, kKeysPerChunk, s.query + static_cast<int64_t>(r0) * D, D, keys + chunk, B, rows, count_16,
                  D, false);
        }
        for (int r = 0; r < rows; ++r) {
          const int valid = std::clamp(s.row_key_end[r0 + r] - block_start - chunk, 0, count);
          float* probabilities = static_cast<float*>(s.probabilities) + r * kKeysPerChunk;
          const float rescale = softmax_row<false, dtype != kBFloat16>(
              s.rows[r0 + r], s.scores + r * kKeysPerChunk, probabilities, count_16, valid, scale_log2);
          if (rescale != 1.0f) scale_row(s.accumulator + static_cast<int64_t>(r0 + r) * D, rescale, D);
        }
        product(s.accumulator + static_cast<int64_t>(r0) * D, D, static_cast<float*>(s.probabilities), kKeysPerChunk,
                values + static_cast<int64_t>(chunk) * D, D, rows, D, count, true);
      }
    }
  }
  finish_rows(a, item, s);
}

// -------------------------------------------------------------------------- pairs layout: bfloat16 with AMX tiles

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0, 1: left operand (first and second 16 rows); 2, 3: right operand; 4 to 7: results.
inline void configure_tiles(int rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_per_row[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile == 2 || tile == 3 ? 16 : rows);
  }
  _tile_loadconfig(&config);
}

// c[rows, 32] (+)= a[rows, 32 * steps] x two columns of 16, for 16 or fewer rows (one) or 32 rows (two).
// right_0 and right_1 each hold `steps` tiles one after the other.
template <bool two_row_tiles>
inline void tile_pair(float* c, int64_t ldc, const uint16_t* a, int64_t lda, const uint16_t* right_0,
                      const uint16_t* right_1, int steps, bool accumulate) {
  const int64_t c_bytes = ldc * 4, a_bytes = lda * 2;
  if (accumulate) {
    _tile_loadd(4, c, c_bytes);
    _tile_loadd(5, c + 16, c_bytes);
    if constexpr (two_row_tiles) {
      _tile_loadd(6, c + 16 * ldc, c_bytes);
      _tile_loadd(7, c + 16 * ldc + 16, c_bytes);
    }
  } else {
    _tile_zero(4);
    _tile_zero(5);
    if constexpr (two_row_tiles) {
      _tile_zero(6);
      _tile_zero(7);
    }
  }
  for (int step = 0; step < steps; ++step) {
    _tile_loadd(0, a + step * 32, a_bytes);
    _tile_loadd(2, right_0 + step * 512, 64);
    _tile_dpbf16ps(4, 0, 2);
    _tile_loadd(3, right_1 + step * 512, 64);
    _tile_dpbf16ps(5, 0, 3);
    if constexpr (two_row_tiles) {
      _tile_loadd(1, a + 16 * lda + step * 32, a_bytes);
      _tile_dpbf16ps(6, 1, 2);
      _tile_dpbf16ps(7, 1, 3);
    }
  }
  _tile_stored(4, c, c_bytes);
  _tile_stored(5, c + 16, c_bytes);
  if constexpr (two_row_tiles) {
    _tile_stored(6, c + 16 * ldc, c_bytes);
    _tile_stored(7, c + 16 * ldc + 16, c_bytes);
  }
}

inline void tile_pair_of_rows(bool two, float* c, int64_t ldc, const uint16_t* a, int64_t lda, const uint16_t* right_0,
                              const uint16_t* right_1, int steps, bool accumulate) {
  if (two) {
    tile_pair<true>(c, ldc, a, lda, right_0, right_1, steps, accumulate);
  } else {
    tile_pair<false>(c, ldc, a, lda, right_0, right_1, steps, accumulate);
  }
}

void attend_pairs(const RelayArguments& a, const Item& item, const Scratch& s) {
  const int32_t* segment = a.segments + item.segment * 5;
  const int32_t* blocks = a.block_table + segment[0] * a.block_table_stride;
  const int group = heads_per_kv(a), D = a.head_size, B = a.block_size;
  const int num_rows = (item.slot_end - item.slot_begin) * group;
  const int tile_rows = std::min(num_rows, 16);
  const int padded_rows = num_rows <= 16 ? num_rows : (num_rows + 15) / 16 * 16;
  const float scale_log2 = a.scale * kLog2e;
  uint16_t* query = reinterpret_cast<uint16_t*>(s.query);
  uint16_t* probabilities = static_cast<uint16_t*>(s.probabilities);

  int last_key = segment[1], row = 0;
  for (int slot = item.slot_begin; slot < item.slot_end; ++slot) {
    last_key = std::max(last_key, a.slot_key_end[slot]);
    for (int g = 0; g < group; ++g, ++row) {
      const int head = item.kv_head * group + g;
      std::memcpy(query + static_cast<int64_t>(row) * D,
                  static_cast<const uint16_t*>(a.query) + a.slot_token[slot] * a.query_stride_token +
                      head * a.query_stride_head,
                  D * 2);
      s.rows[row] = RowState{kMinusInf, 0.0f};
      s.row_key_end[row] = a.slot_key_end[slot];
    }
  }
  for (; row < padded_rows; ++row) {
    std::memset(query + static_cast<int64_t>(row) * D, 0, D * 2);
    s.rows[row] = RowState{kMinusInf, 0.0f};
    s.row_key_end[row] = 0;
  }
  std::memset(s.accumulator, 0, static_cast<int64_t>(padded_rows) * D * sizeof(float));
  configure_tiles(tile_rows);

  for (int block_start = segment[1]; block_start < last_key; block_start += B) {
    const int64_t at =
        static_cast<int64_t>(blocks[block_start / B]) * a.cache_stride_block + item.kv_head * a.cache_stride_head;
    const uint16_t* keys = static_cast<const uint16_t*>(a.key_cache) + at;
    const uint16_t* values = static_cast<const uint16_t*>(a.value_cache) + at;
    const int used = std::min(B, last_key - block_start);
    for (int chunk = 0; chunk < used; chunk += kKeysPerChunk) {
      const int count = std::min(kKeysPerChunk, used - chunk);
      const int count_32 = (count + 31) / 32 * 32;
      const int whole = count / 32;  // value steps read in place
      const bool ragged = count % 32 != 0;
      if (ragged) {  // what lies beyond the last key is stale and may be NaN: it must not meet a zero probability
        const int kept_pairs = (count % 32) / 2, odd = count % 2;
        for (int dims = 0; dims < D / 16; ++dims) {
          uint16_t* tail = s.value_tail + dims * 512;
          const uint16_t* from = values + dims * 16 * B + (chunk + whole * 32) * 16;
          std::memcpy(tail, from, kept_pairs * 64);
          std::memset(tail + kept_pairs * 32, 0, (16 - kept_pairs) * 64);
          if (odd)
            for (int d = 0; d < 16; ++d) tail[kept_pairs * 32 + d * 2] = from[kept_pairs * 32 + d * 2];
        }
      }
      for (int r0 = 0; r0 < padded_rows; r0 += 32) {
        const int rows = std::min(32, padded_rows - r0);
        const bool two = rows > 16;
        for (int key = 0; key < count_32; key += 32) {
          const uint16_t* right = keys + static_cast<int64_t>(chunk + key) * D;
          tile_pair_of_rows(two, s.scores + key, kKeysPerChunk, query + static_cast<int64_t>(r0) * D, D, right,
                            right + 16 * D, D / 32, false);
        }
        for (int r = 0; r < rows; ++r) {
          const int valid = std::clamp(s.row_key_end[r0 + r] - block_start - chunk, 0, count);
          const float rescale = softmax_row<true, false>(s.rows[r0 + r], s.scores + r * kKeysPerChunk,
                                                  probabilities + r * kKeysPerChunk, count_32, valid, scale_log2);
          if (rescale != 1.0f) scale_row(s.accumulator + static_cast<int64_t>(r0 + r) * D, rescale, D);
        }
        float* accumulator = s.accumulator + static_cast<int64_t>(r0) * D;
        for (int dims = 0; dims < D; dims += 32) {
          const uint16_t* right = values + static_cast<int64_t>(dims) * B + chunk * 16;
          if (whole > 0)
            tile_pair_of_rows(two, accumulator + dims, D, probabilities, kKeysPerChunk, right, right + 16 * B, whole,
                              true);
          if (ragged) {
            const uint16_t* tail = s.value_tail + dims * 32;
            tile_pair_of_rows(two, accumulator + dims, D, probabilities + whole * 32, kKeysPerChunk, tail, tail + 512,
                              1, true);
          }
        }
      }
    }
  }
  finish_rows(a, item, s);
}
#endif

// ------------------------------------------------------------------------------------------------- fusion by LSE

void merge_token(const RelayArguments& a, int token, float* sum) {
  const int begin = a.token_slot_start[token], end = a.token_slot_start[token + 1];
  const int D = a.head_size;
  if (end - begin == 1) return;  // its only slot wrote the output
  for (int head = 0; head < a.num_heads; ++head) {
    float maximum = kMinusInf;
    for (int i = begin; i < end; ++i)
      maximum = std::max(maximum, a.partial_lse[static_cast<int64_t>(a.token_slots[i]) * a.num_heads + head]);
    std::memset(sum, 0, D * sizeof(float));
    float total = 0.0f;
    for (int i = begin; i < end; ++i) {
      const int64_t partial = static_cast<int64_t>(a.token_slots[i]) * a.num_heads + head;
      if (a.partial_lse[partial] == kMinusInf) continue;  // saw nothing; NaN is not equal to it
      const float weight = std::exp(a.partial_lse[partial] - maximum);
      const float* __restrict__ from = a.partial_out + partial * D;
      for (int d = 0; d < D; ++d) sum[d] += weight * from[d];
      total += weight;
    }
    if (total != 0.0f) scale_row(sum, 1.0f / total, D);
    store_floats(a.dtype, a.out, token * a.out_stride_token + head * a.out_stride_head, sum, D);
    if (a.lse)
      a.lse[static_cast<int64_t>(token) * a.num_heads + head] = total != 0.0f ? maximum + std::log(total) : kMinusInf;
  }
}

void attend(const RelayArguments& a, const Item& item, const Scratch& s) {
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__)
  if (a.layout == kPairs) return attend_pairs(a, item, s);
#endif
  if (a.dtype == kFloat32) return attend_planes<kFloat32>(a, item, s);
  if (a.dtype == kFloat16) return attend_planes<kFloat16>(a, item, s);
  attend_planes<kBFloat16>(a, item, s);
}

struct Arena {  // one allocation, carved in 64-byte steps
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return result;
  }
};

Scratch carve(Arena& arena, const RelayArguments& a) {
  const int64_t rows = std::max(kRowsPerItem, heads_per_kv(a)) + 16, D = a.head_size, B = a.block_size;
  Scratch s;
  s.accumulator = arena.take<float>(rows * D);
  s.scores = arena.take<float>(32 * kKeysPerChunk);
  s.query = arena.take<float>(rows * D);
  s.probabilities = arena.take<float>(32 * kKeysPerChunk);
  s.key_plane = arena.take<float>(D * (B + 16));
  s.value_plane = arena.take<float>(D * (B + 16));
  s.value_tail = arena.take<uint16_t>(D * 32);
  s.rows = arena.take<RowState>(rows);
  s.row_key_end = arena.take<int32_t>(rows);
  return s;
}

// Memory that a thread keeps from call to call: fresh pages cost more than the work of a small layer.
class ThreadMemory {
 public:
  ~ThreadMemory() { ::operator delete(memory_, std::align_val_t(64)); }

  char* of_size(int64_t size) {  // null where it cannot be had
    if (size > size_) {
      ::operator delete(memory_, std::align_val_t(64));
      memory_ = static_cast<char*>(::operator new(size, std::align_val_t(64), std::nothrow));
      size_ = memory_ ? size : 0;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  int64_t size_ = 0;
};

thread_local ThreadMemory thread_memory;

}  // namespace

extern "C" {

// Layouts this build can run, as a bit mask of 1 << Layout.
int relay_layouts() {
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__)
  return (1 << kPlanes) | (1 << kPairs);
#else
  return 1 << kPlanes;
#endif
}

// 0 on success, 1 where a thread's scratch memory could not be had.
int relay_attention(const RelayArguments* arguments) {
  const RelayArguments& a = *arguments;
  const int group = heads_per_kv(a);
  const int slots_per_item = std::max(1, kRowsPerItem / group);
  int64_t num_items = 0;
  for (int i = 0; i < a.num_segments; ++i) {
    const int slots = a.segments[i * 5 + 4] - a.segments[i * 5 + 3];
    num_items += static_cast<int64_t>((slots + slots_per_item - 1) / slots_per_item) * a.num_kv_heads;
  }
  Item* items = new (std::nothrow) Item[std::max<int64_t>(num_items, 1)];
  if (!items) return 1;
  int64_t n = 0;
  for (int i = 0; i < a.num_segments; ++i) {
    const int32_t* segment = a.segments + i * 5;
    for (int slot = segment[3]; slot < segment[4]; slot += slots_per_item)
      for (int kv_head = 0; kv_head < a.num_kv_heads; ++kv_head)
        items[n++] = Item{i, kv_head, slot, std::min(segment[4], slot + slots_per_item)};
  }
  Arena measure{nullptr};
  carve(measure, a);
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
#pragma omp parallel
  {
    char* memory = thread_memory.of_size(measure.used);
    if (!memory) {
      failed = 1;
    } else {
      Arena arena{memory};
      const Scratch scratch = carve(arena, a);
      for (int64_t i; (i = next.fetch_add(1)) < num_items;) attend(a, items[i], scratch);
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__)
      if (a.layout == kPairs) _tile_release();
#endif
    }
#pragma omp barrier
    if (!failed) {
#pragma omp for schedule(static)
      for (int token = 0; token < a.num_tokens; ++token)
        merge_token(a, token, reinterpret_cast<float*>(memory));
    }
  }
  delete[] items;
  return failed;
}

}  // extern "C"
