// Fused elementwise steps between int8 matmuls on a CPU; each reads and writes memory once.
// cpu_int8_ops.py compiles, loads and calls this file, and defines each op in PyTorch operations.
// GCC's and Clang's vector types: 16 numbers at a time whatever the processor; no fast-math.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr long LANES = 16;
constexpr long STRIP = 64;    // pixels that stay in the first cache while channels take turns
constexpr long RUN = 1024;    // pixels to a task: sums do not depend on the number of threads

typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t Word __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef uint8_t Byte __attribute__((vector_size(LANES)));

struct bf16 {
  uint16_t bits;
};

inline Float all(float x) { return x - Float{}; }

// the first n of 16 numbers, the rest zero
template <typename V, typename T>
inline V raw(const T* p, long n) {
  V v{};
  if (n >= LANES) {
    memcpy(&v, p, sizeof(v));
  } else {
    memcpy(&v, p, n * sizeof(T));
  }
  return v;
}

inline Float load(const float* p, long n) { return raw<Float>(p, n); }

inline Float load(const bf16* p, long n) {
  return (Float)(__builtin_convertvector(raw<Half>(p, n), Word) << 16);
}

template <typename V, typename T>
inline void put(T* p, V v, long n) {
  if (n >= LANES) {
    memcpy(p, &v, sizeof(v));
  } else {
    memcpy(p, &v, n * sizeof(T));
  }
}

inline void store(float* p, Float x, long n) { put(p, x, n); }

inline void store(bf16* p, Float x, long n) {
  Word u = (Word)x;
  u += 0x7fff + ((u >> 16) & 1);  // to nearest, ties to even
  u = x == x ? u : (Word)x | 0x400000;  // a NaN stays one
  put(p, __builtin_convertvector(u >> 16, Half), n);
}

// to nearest, ties to even, for |x| < 2**22
inline Int rounded(Float x) { return (Int)(x + 0x1.8p23f) - 0x4b400000; }

inline void store(uint8_t* p, Int x, long n) { put(p, __builtin_convertvector(x, Byte), n); }

inline Float larger(Float a, Float b) { return a > b ? a : b; }
inline Float smaller(Float a, Float b) { return a < b ? a : b; }

inline float largest(Float x) {
  float most = x[0];
  for (long i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// exp(x) for x in [-87, 87], clamped beyond: two units in the last place
inline Float exponential(Float x) {
  x = smaller(larger(x, all(-87.0f)), all(87.0f));
  Int n = rounded(x * 1.44269504f);
  Float whole = __builtin_convertvector(n, Float);
  Float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Float)((Int)p + (n << 23));
}

inline Float silu(Float x) { return x / (1.0f + exponential(-x)); }

// erf by formula 7.1.26 of Abramowitz and Stegun, error 1.5e-7, as PyTorch's vectors have it
inline Float gelu(Float x) {
  Float size = x < 0.0f ? -x : x;
  Float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * size);
  Float p = 1.061405429f * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Float rest = p * t * exponential(-0.5f * x * x);  // 1 - erf(size / sqrt(2))
  return 0.5f * x * (x < 0.0f ? rest : 2.0f - rest);
}

template <typename T>
void quantize_rows(const T* x, uint8_t* q, float* scales, long R, long D) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < R; r++) {
    const T* row = x + r * D;
    Float most = {};
    for (long i = 0; i < D; i += LANES) {
      Float v = load(row + i, D - i);
      most = larger(v < 0.0f ? -v : v, most);
    }
    float scale = largest(most);
    scale = (scale < 1e-12f ? 1e-12f : scale) / 127.0f;
    scales[r] = scale;
    for (long i = 0; i < D; i += LANES)
      store(q + r * D + i, rounded(load(row + i, D - i) / scale) + 128, D - i);
  }
}

template <typename T>
void gelu_quantize_rows(const T* y, const float* y_scales, const float* bias, float low,
                        uint8_t* q, float* scales, long R, long D) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < R; r++) {
    const T* row = y + r * D;
    float given = y_scales[r];
    Float most = {};
    for (long i = 0; i < D; i += LANES)
      most = larger(load(row + i, D - i) * given + load(bias + i, D - i), most);
    float scale = (largest(most) - low) / 255.0f, inverse = 1.0f / scale;
    scales[r] = scale;
    for (long i = 0; i < D; i += LANES) {
      Float v = gelu(load(row + i, D - i) * given + load(bias + i, D - i));
      store(q + r * D + i, rounded((v - low) * inverse), D - i);
    }
  }
}

// out may be y
template <typename T, typename U>
void dequantize_rows(const T* y, U* out, const float* scales, const float* bias, long R, long D) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < R; r++)
    for (long i = 0; i < D; i += LANES) {
      Float v = load(y + r * D + i, D - i) * scales[r] + load(bias + i, D - i);
      store(out + r * D + i, v, D - i);
    }
}

// Per channel: sum and sum of squares of x - pivot, least and largest x, for a run of pixels.
template <typename T>
void moments_of_run(const T* x, const float* pivot, float* out, long pixels, long C) {
  float *sum = out, *square = out + C, *least = out + 2 * C, *most = out + 3 * C;
  for (long c = 0; c < C; c++) {
    sum[c] = square[c] = 0.0f;
    least[c] = INFINITY, most[c] = -INFINITY;
  }
  for (long top = 0; top < pixels; top += STRIP) {
    long end = top + STRIP < pixels ? top + STRIP : pixels;
    for (long c = 0; c < C; c += LANES) {
      long n = C - c;
      Float k = load(pivot + c, n), s = load(sum + c, n), ss = load(square + c, n);
      Float low = load(least + c, n), high = load(most + c, n);
      for (long p = top; p < end; p++) {
        Float v = load(x + p * C + c, n), d = v - k;
        s += d;
        ss += d * d;
        low = smaller(v, low);
        high = larger(v, high);
      }
      store(sum + c, s, n), store(square + c, ss, n);
      store(least + c, low, n), store(most + c, high, n);
    }
  }
}

// Scale and shift of each channel that normalise (P, C) by groups; returns the largest result.
template <typename T>
float normalisation(const T* x, const float* weight, const float* bias, long groups, float eps,
                    long P, long C, float* scale, float* shift) {
  long runs = (P + RUN - 1) / RUN, width = C / groups;
  std::vector<float> pivot(C), parts(runs * 4 * C);
  for (long c = 0; c < C; c++) pivot[c] = load(x + c, 1)[0];
#pragma omp parallel for schedule(static)
  for (long i = 0; i < runs; i++) {
    long first = i * RUN, pixels = P - first < RUN ? P - first : RUN;
    moments_of_run(x + first * C, pivot.data(), parts.data() + i * 4 * C, pixels, C);
  }
  std::vector<double> mean(C), spread(C);
  std::vector<float> low(C, INFINITY), high(C, -INFINITY);
  for (long i = 0; i < runs; i++) {
    const float* part = parts.data() + i * 4 * C;
    for (long c = 0; c < C; c++) {
      mean[c] += part[c], spread[c] += part[C + c];
      low[c] = part[2 * C + c] < low[c] ? part[2 * C + c] : low[c];
      high[c] = part[3 * C + c] > high[c] ? part[3 * C + c] : high[c];
    }
  }
  float most = -INFINITY;
  for (long g = 0; g < groups; g++) {
    double middle = 0, squares = 0;
    for (long c = g * width; c < (g + 1) * width; c++) {
      spread[c] -= mean[c] * mean[c] / P;
      mean[c] = pivot[c] + mean[c] / P;
      middle += mean[c] / width;
    }
    for (long c = g * width; c < (g + 1) * width; c++)
      squares += spread[c] / P + (mean[c] - middle) * (mean[c] - middle);
    double rstd = 1.0 / std::sqrt(squares / width + eps);
    for (long c = g * width; c < (g + 1) * width; c++) {
      scale[c] = weight[c] * rstd;
      shift[c] = bias[c] - middle * weight[c] * rstd;
      float end = (scale[c] > 0 ? high[c] : low[c]) * scale[c] + shift[c];
      most = end > most ? end : most;
    }
  }
  return most;
}

inline Int in_bytes(Int x) {
  x = x < 0 ? Int{} : x;
  return x > 255 ? 255 - Int{} : x;
}

// The step of a range that holds 0, and the byte that stands for 0.
inline void span(float low, float high, float* steps) {
  float step = (high - low) / 255.0f;
  steps[0] = step < 1e-12f ? 1e-12f : step;
  steps[1] = std::nearbyint(-low / steps[0]);
}

template <typename T>
void quantize_image(const T* x, long n, uint8_t* q, float* steps) {
  constexpr long RUN_OF_NUMBERS = 1 << 14;
  long runs = (n + RUN_OF_NUMBERS - 1) / RUN_OF_NUMBERS;
  std::vector<float> lows(runs), highs(runs);
#pragma omp parallel for schedule(static)
  for (long r = 0; r < runs; r++) {
    Float low = {}, high = {};
    long end = (r + 1) * RUN_OF_NUMBERS < n ? (r + 1) * RUN_OF_NUMBERS : n;
    for (long i = r * RUN_OF_NUMBERS; i < end; i += LANES) {
      Float v = load(x + i, end - i);
      low = smaller(v, low);
      high = larger(v, high);
    }
    lows[r] = -largest(-low), highs[r] = largest(high);
  }
  float low = 0.0f, high = 0.0f;
  for (long r = 0; r < runs; r++) {
    low = lows[r] < low ? lows[r] : low;
    high = highs[r] > high ? highs[r] : high;
  }
  span(low, high, steps);
  float step = steps[0];
  int zero = (int)steps[1];
#pragma omp parallel for schedule(static)
  for (long i = 0; i < n; i += LANES)
    store(q + i, in_bytes(rounded(load(x + i, n - i) / step) + zero), n - i);
}

template <typename T>
void norm_silu_quantize(const T* x, const float* weight, const float* bias, long groups, float eps,
                        long P, long C, float low, uint8_t* q, float* steps) {
  std::vector<float> scale(C), shift(C);
  float most = normalisation(x, weight, bias, groups, eps, P, C, scale.data(), shift.data());
  float high = most > 0 ? most / (1.0f + std::exp(-most)) : 0.0f;
  span(low, high, steps);
  float inverse = 1.0f / steps[0];
  int zero = (int)steps[1];
#pragma omp parallel for schedule(static)
  for (long p = 0; p < P; p++)
    for (long c = 0; c < C; c += LANES) {
      long i = p * C + c, n = C - c;
      Float y = silu(load(x + i, n) * load(scale.data() + c, n) + load(shift.data() + c, n));
      store(q + i, in_bytes(rounded(y * inverse) + zero), n);
    }
}

}  // namespace

#define FOR(T, NAME)                                                                              \
  extern "C" void quantize_rows_##NAME(const T* x, uint8_t* q, float* scales, long R, long D) {   \
    quantize_rows(x, q, scales, R, D);                                                            \
  }                                                                                               \
  extern "C" void gelu_quantize_rows_##NAME(const T* y, const float* y_scales, const float* bias, \
                                            float low, uint8_t* q, float* scales, long R,         \
                                            long D) {                                             \
    gelu_quantize_rows(y, y_scales, bias, low, q, scales, R, D);                                  \
  }                                                                                               \
  extern "C" void dequantize_rows_##NAME(const T* y, float* out, bf16* narrow,                    \
                                         const float* scales, const float* bias, long R,          \
                                         long D) {                                                \
    if (narrow)                                                                                   \
      dequantize_rows(y, narrow, scales, bias, R, D);                                             \
    else                                                                                          \
      dequantize_rows(y, out, scales, bias, R, D);                                                \
  }                                                                                               \
  extern "C" void quantize_image_##NAME(const T* x, long n, uint8_t* q, float* steps) {           \
    quantize_image(x, n, q, steps);                                                               \
  }                                                                                               \
  extern "C" void norm_silu_quantize_##NAME(const T* x, const float* w, const float* b,           \
                                            long groups, float eps, long P, long C, float low,    \
                                            uint8_t* q, float* steps) {                           \
    norm_silu_quantize(x, w, b, groups, eps, P, C, low, q, steps);                                \
  }

FOR(float, float32)
FOR(bf16, bfloat16)
