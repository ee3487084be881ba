// A linear router: the scores of a token's heads, which heads it uses, and what became of the heads that it does not.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "decode.h"
#include "simd.h"

namespace mixhead {

// The dot product of two rows, summed in float.
template <class In>
inline float dot(const In* a, const In* b, int64_t count) {
  Vec sums[4] = {all(0.f), all(0.f), all(0.f), all(0.f)};
  int64_t c = 0;
  for (; c + 4 * kLanes <= count; c += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) sums[i] += load_wide(a + c + i * kLanes) * load_wide(b + c + i * kLanes);
  }
  for (; c + kLanes <= count; c += kLanes) sums[0] += load_wide(a + c) * load_wide(b + c);
  float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < count; ++c) sum += widen(a[c]) * widen(b[c]);
  return sum;
}

// Heads [H] in groups of equal size, of which a token uses `active` in each: shared ones first, then the largest scores.
struct HeadChoice {
  int64_t H, groups, active;
  const bool* shared;

  // Shared heads before all others; no other score may be infinite, and NaN comes last.
  void rank(const float* scores, float* ranked) const {
    constexpr float kMost = -kLowest;
    for (int64_t h = 0; h < H; ++h) {
      const float score = std::isnan(scores[h]) ? kLowest : std::clamp(scores[h], kLowest, kMost);
      ranked[h] = shared[h] ? kInfinity : score;
    }
  }

  // A head is selected where fewer than `active` come before it; of equal ones the first comes first.
  void select(const float* ranked, int32_t* before, bool* selected) const {
    const int64_t size = H / groups;
    for (int64_t first = 0; first < H; first += size) {
      const float* rank = ranked + first;
      std::fill(before, before + size, 0);
      for (int64_t other = 0; other < size; ++other) {
        const float theirs = rank[other];
        for (int64_t h = 0; h <= other; ++h) before[h] += theirs > rank[h];
        for (int64_t h = other + 1; h < size; ++h) before[h] += theirs >= rank[h];
      }
      for (int64_t h = 0; h < size; ++h) selected[first + h] = before[h] < active;
    }
  }

  // The softmax over the heads that compete, 0 at shared ones; NaN where a score is NaN.
  void probabilities(const float* scores, float* probs) const {
    float most = -kInfinity, sum = 0.f;
    for (int64_t h = 0; h < H; ++h) most = shared[h] ? most : std::max(most, scores[h]);
    for (int64_t h = 0; h < H; ++h) sum += probs[h] = shared[h] ? 0.f : std::exp(scores[h] - most);
    for (int64_t h = 0; h < H; ++h) probs[h] = shared[h] ? 0.f : probs[h] / sum;
  }
};

}  // namespace mixhead
