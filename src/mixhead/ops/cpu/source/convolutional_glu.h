// The middle of a convolutional GLU, in one pass over its memory: biases, depthwise 3 x 3 convolution of the gates, GELU,
// product with the values; forward and backward.
//
// The channels of a token lie side by side, [B, Y X, 2 M], the gates first, as one projection makes them. A task is an image
// and kChannels of its channels. It walks down the map with three rows of biased gates in nearest memory, kAcross
// columns at a time, so that a tap and a gate are loaded once for several sums. Backward makes the convolution again
// instead of keeping it, and has three rows of its gradient beside those of the gates.
//
//     c = sum_k w_k (gate + gate bias) + conv bias,   y = gelu(c) (value + value bias),   gelu(c) = c Phi(c)
//     dc = dy (value + value bias) gelu'(c),   gelu'(c) = Phi(c) + c phi(c)
#pragma once

#include "views.h"

namespace mixhead {

constexpr int64_t kChannels = 64, kVectors = kChannels / kLanes;  // of a task: enough of a token to read at a time
constexpr int64_t kAcross = 4;                                  // columns that are summed at once
constexpr int64_t kTaps = 9;

// Phi, the normal distribution: 1/2 + x P(x^2) / Q(x^2) between -5.5 and 5.5, where it is 0 and 1 but for 2e-8. The
// polynomials are a weighted minimax fit; GELU then errs by at most 1e-6, in rounding.
constexpr float kTail = 5.5f;

inline Vec normal_distribution(Vec x) {
  const Vec low = x < all(-kTail) ? all(-kTail) : x, bounded = low > all(kTail) ? all(kTail) : low;  // NaN stays
  const Vec t = bounded * bounded;
  Vec p = t * 2.221578121464063e-08f + 6.530753125844058e-06f, q = t * 1.1953945886489237e-06f + 7.861088670324534e-05f;
  p = p * t + 0.00018286007980350405f;
  q = q * t + 0.0019624449778348207f;
  p = p * t + 0.004761627409607172f;
  q = q * t + 0.029398800805211067f;
  p = p * t + 0.03514251485466957f;
  q = q * t + 0.2547528147697449f;
  p = p * t + 0.3989419937133789f;
  q = q * t + 1.f;
  return bounded * (p / q) + 0.5f;
}

inline Vec gelu_from(Vec x, Vec distribution) { return x < all(-kTail) ? all(0.f) : x * distribution; }

inline Vec gelu_derivative_from(Vec x, Vec distribution) {
  const Vec density = exp(x * x * -0.5f) * 0.3989422804f;
  return x < all(-kTail) ? all(0.f) : distribution + x * density;
}

template <class T>
class ConvolutionalGLU {
 public:
  int64_t B, Y, X, M;
  const T* hidden;                          // [B][Y][X][2 M]
  const float *bias, *weight, *conv_bias;  // [2 M], [M][9], [M]

  int64_t tasks() const { return B * tasks_of_image(); }
  // What a task works in: three lines of the map for each of two rings.
  float* memory(Arena& arena) const { return arena.take<float>(6 * line()); }

  void forward(float* memory, int64_t task, T* out) const {
    const Channels c = channels(task);
    const Ring gates(memory, line());
    fill(c, gates, 0);
    for (int64_t y = 0; y < Y; ++y) {
      fill(c, gates, y + 1);
      for (int64_t x = 0; x < X; x += kAcross) {
        for (int v = 0; v < kVectors; ++v) {
          Vec sum[kAcross];
          convolve(gates, y, x, v, c.tap, c.conv_bias, sum);
          for (int64_t i = 0; i < std::min(kAcross, X - x); ++i) {
            const Vec value = load_wide_first(row(c, y, x + i) + M + v * kLanes, c.count[v]) + load(c.value_bias + v * kLanes);
            const Vec gate = gelu_from(sum[i], normal_distribution(sum[i]));
            store_narrow_first(out + ((c.b * Y + y) * X + x + i) * M + c.first + v * kLanes, gate * value, c.count[v]);
          }
        }
      }
    }
  }

  // Gradients of one task. `sums`, [B][12][M], takes those of the taps, the bias of the convolution, and the biases of
  // gates and values: the images are added up afterwards, so that the order never depends on the threads.
  void backward(float* memory, int64_t task, const T* grad, T* d_hidden, float* sums) const {
    const Channels c = channels(task);
    const Ring gates(memory, line()), d_conv(memory + 3 * line(), line());
    Sums total{};
    fill(c, gates, 0);
    for (int64_t y = 0; y <= Y; ++y) {
      fill(c, gates, y + 1);
      std::memset(d_conv.row(y), 0, line() * sizeof(float));
      if (y < Y) differentiate(c, gates, d_conv, y, grad, d_hidden, total);
      if (y > 0) spread(c, d_conv, y - 1, d_hidden, total);
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int64_t k = 0; k < kSums; ++k) {
        store_first(sums + (c.b * kSums + k) * M + c.first + v * kLanes, load(total.of[k] + v * kLanes), c.count[v]);
      }
    }
  }

 private:
  static constexpr int64_t kSums = kTaps + 3;

  struct Channels {
    int64_t b, first, count[kVectors];
    alignas(64) float tap[kTaps][kChannels], turned_tap[kTaps][kChannels];
    alignas(64) float gate_bias[kChannels], value_bias[kChannels], conv_bias[kChannels];
  };

  struct Sums {
    alignas(64) float of[kSums][kChannels];
    void add(int64_t k, int v, Vec x) { store(of[k] + v * kLanes, load(of[k] + v * kLanes) + x); }
  };

  // Three rows of the map with zeros around it; row -1 is zeros from the beginning.
  struct Ring {
    float* data;
    int64_t line;
    Ring(float* data_, int64_t line_) : data(data_), line(line_) { std::memset(data, 0, 3 * line * sizeof(float)); }
    float* row(int64_t y) const { return data + (y + 3) % 3 * line; }
  };

  int64_t tasks_of_image() const { return (M + kChannels - 1) / kChannels; }
  int64_t line() const { return (round_up(X, kAcross) + 2) * kChannels; }
  int64_t at(const Channels& c, int64_t y, int64_t x) const { return ((c.b * Y + y) * X + x) * 2 * M + c.first; }
  const T* row(const Channels& c, int64_t y, int64_t x) const { return hidden + at(c, y, x); }

  Channels channels(int64_t task) const {
    Channels c{};
    c.b = task / tasks_of_image();
    c.first = task % tasks_of_image() * kChannels;
    const int64_t count = std::min(kChannels, M - c.first);
    for (int v = 0; v < kVectors; ++v) c.count[v] = std::clamp<int64_t>(count - v * kLanes, 0, kLanes);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t m = c.first + i;
      for (int64_t k = 0; k < kTaps; ++k) c.tap[k][i] = c.turned_tap[kTaps - 1 - k][i] = weight[m * kTaps + k];
      c.gate_bias[i] = bias[m];
      c.value_bias[i] = bias[M + m];
      c.conv_bias[i] = conv_bias[m];
    }
    return c;
  }

  // A row of the biased gates; zeros below the map.
  void fill(const Channels& c, const Ring& gates, int64_t y) const {
    float* to = gates.row(y) + kChannels;
    if (y >= Y) {
      std::memset(to, 0, X * kChannels * sizeof(float));
      return;
    }
    for (int64_t x = 0; x < X; ++x) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec gate = load_wide_first(row(c, y, x) + v * kLanes, c.count[v]);
        store(to + x * kChannels + v * kLanes, gate + load(c.gate_bias + v * kLanes));
      }
    }
  }

  // sum[i] = start + sum_k tap_k (the map at the k-th place around (y, x + i)).
  static void convolve(const Ring& map, int64_t y, int64_t x, int v, const float (*tap)[kChannels], const float* start,
                       Vec* sum) {
#pragma GCC unroll 4
    for (int i = 0; i < kAcross; ++i) sum[i] = load(start + v * kLanes);
#pragma GCC unroll 3
    for (int down = 0; down < 3; ++down) {
      const float* from = map.row(y + down - 1) + x * kChannels + v * kLanes;
      Vec in[kAcross + 2];
#pragma GCC unroll 6
      for (int i = 0; i < kAcross + 2; ++i) in[i] = load(from + i * kChannels);
#pragma GCC unroll 3
      for (int right = 0; right < 3; ++right) {
        const Vec factor = load(tap[down * 3 + right] + v * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kAcross; ++i) sum[i] += factor * in[i + right];
      }
    }
  }

  // A row of the gradient of the convolution and of the values, and its part of the taps' and two biases' gradients.
  void differentiate(const Channels& c, const Ring& gates, const Ring& d_conv, int64_t y, const T* grad, T* d_hidden,
                     Sums& total) const {
    float* to = d_conv.row(y) + kChannels;
    for (int v = 0; v < kVectors; ++v) {
      Vec d_taps[kTaps], d_bias = all(0.f), d_value_bias = all(0.f);
      for (Vec& d_tap : d_taps) d_tap = all(0.f);
      for (int64_t x = 0; x < X; x += kAcross) {
        Vec sum[kAcross], d_sum[kAcross];
        convolve(gates, y, x, v, c.tap, c.conv_bias, sum);
        for (int64_t i = 0; i < kAcross; ++i) {
          d_sum[i] = all(0.f);
          if (x + i >= X) continue;
          const Vec value = load_wide_first(row(c, y, x + i) + M + v * kLanes, c.count[v]) + load(c.value_bias + v * kLanes);
          const Vec d_out = load_wide_first(grad + ((c.b * Y + y) * X + x + i) * M + c.first + v * kLanes, c.count[v]);
          const Vec distribution = normal_distribution(sum[i]), d_value = d_out * gelu_from(sum[i], distribution);
          d_sum[i] = d_out * value * gelu_derivative_from(sum[i], distribution);
          store_narrow_first(d_hidden + at(c, y, x + i) + M + v * kLanes, d_value, c.count[v]);
          store(to + (x + i) * kChannels + v * kLanes, d_sum[i]);
          d_bias += d_sum[i];
          d_value_bias += d_value;
        }
        add_taps(gates, y, x, v, d_sum, d_taps);
      }
      for (int64_t k = 0; k < kTaps; ++k) total.add(k, v, d_taps[k]);
      total.add(kTaps, v, d_bias);
      total.add(kTaps + 2, v, d_value_bias);
    }
  }

  static void add_taps(const Ring& gates, int64_t y, int64_t x, int v, const Vec* d_sum, Vec* d_taps) {
#pragma GCC unroll 3
    for (int down = 0; down < 3; ++down) {
      const float* from = gates.row(y + down - 1) + x * kChannels + v * kLanes;
      Vec in[kAcross + 2];
#pragma GCC unroll 6
      for (int i = 0; i < kAcross + 2; ++i) in[i] = load(from + i * kChannels);
#pragma GCC unroll 3
      for (int right = 0; right < 3; ++right) {
#pragma GCC unroll 4
        for (int i = 0; i < kAcross; ++i) d_taps[down * 3 + right] += d_sum[i] * in[i + right];
      }
    }
  }

  // A row of the gradient of the gates: the gradient of the convolution through the taps, turned by half a turn.
  void spread(const Channels& c, const Ring& d_conv, int64_t y, T* d_hidden, Sums& total) const {
    alignas(64) static constexpr float zeros[kChannels] = {};
    for (int v = 0; v < kVectors; ++v) {
      Vec d_bias = all(0.f);
      for (int64_t x = 0; x < X; x += kAcross) {
        Vec d_gate[kAcross];
        convolve(d_conv, y, x, v, c.turned_tap, zeros, d_gate);
        for (int64_t i = 0; i < std::min(kAcross, X - x); ++i) {
          store_narrow_first(d_hidden + at(c, y, x + i) + v * kLanes, d_gate[i], c.count[v]);
          d_bias += d_gate[i];
        }
      }
      total.add(kTaps + 1, v, d_bias);
    }
  }
};

}  // namespace mixhead
