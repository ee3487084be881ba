// Aggregated attention of the selected heads: a local window and pooled keys under one softmax; forward and backward.
//
// The rows that select a head are listed by position and cut into blocks of 64. Against pooled keys a block's queries stand
// in the vector lanes, as in attention.h: S^T [T][64] = K S^T is a small matrix product. A window's keys differ from row to
// row, so there the rows lie in the vectors: 16 rows times their key at one place of the window are 16 vectors, whose sums
// become one vector over the lanes. Both kinds of scores then meet in one softmax that never reduces across lanes. The keys
// of a window are read where the map has them; nothing is unfolded.
//
// With u(x) = x / |x|, query embedding e, temperature c and n_keys keys in sight:
//     s = (u(q) + e) c log(n_keys),   S_l = s u(k_l) + local bias,   S_t = s u(k_t) + pool bias,   P = softmax(S)
//     heads = sum_l (P_l + u(q) token_l + learnable bias_l) v_l + sum_t P_t v_t
//
// Legend: as in attention.h; T pooled keys, L places of the window, Y and X rows and columns of the map.
#pragma once

#include "attention.h"

namespace mixhead {

constexpr int kMostVectors = kLanes == 4 ? 8 : 4;  // of one head: D is at most kMostVectors * kLanes
constexpr float kShortest = 1e-12f;                // vectors are divided by at least this length
constexpr int64_t kMostPlaces = 49;

// ------------------------------------------------------------------------------------------------ vectors of D numbers

// D numbers in V vectors, the last one filled up with zeros.
template <int V>
struct Row {
  Vec v[V];
  static Row zero() {
    Row row;
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) row.v[i] = all(0.f);
    return row;
  }
  static Row from(const float* p, int64_t D) {
    Row row;
#pragma GCC unroll 8
    for (int i = 0; i + 1 < V; ++i) row.v[i] = load(p + i * kLanes);
    row.v[V - 1] = load_first(p + (V - 1) * kLanes, D - (V - 1) * kLanes);
    return row;
  }
  static Row from(const float* p) {  // padded
    Row row;
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) row.v[i] = load(p + i * kLanes);
    return row;
  }
  void to(float* p, int64_t D) const {
#pragma GCC unroll 8
    for (int i = 0; i + 1 < V; ++i) store(p + i * kLanes, v[i]);
    store_first(p + (V - 1) * kLanes, v[V - 1], D - (V - 1) * kLanes);
  }
  void to(float* p) const {
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) store(p + i * kLanes, v[i]);
  }
  void add(Vec factor, const Row& other) {
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) v[i] += factor * other.v[i];
  }
  Row times(Vec factor) const {
    Row row;
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) row.v[i] = v[i] * factor;
    return row;
  }
  Vec products(const Row& other) const {
    Vec sum = v[0] * other.v[0];
#pragma GCC unroll 8
    for (int i = 1; i < V; ++i) sum += v[i] * other.v[i];
    return sum;
  }
  float dot(const Row& other) const { return sum_of(products(other)); }
};

inline float inverse_length(float square) { return 1.f / std::max(std::sqrt(square), kShortest); }

// Gradient of x from that of u = x / |x|: the part along u is taken out.
template <int V>
inline Row<V> through_unit(Row<V> du, const Row<V>& u, float inverse) {
  if (inverse < 1.f / kShortest) du.add(all(-du.dot(u)), u);
  return du.times(all(inverse));
}

// ------------------------------------------------------------------------------------------------------- one call

struct Map {
  int64_t B, H, N, T, D, Y, X, window;
  int64_t U, V, R, S;  // rows and columns of pooled keys; of the table of their biases
  int64_t places() const { return window * window; }
};

template <int V>
class Aggregated {
 public:
  static constexpr int64_t kDim = V * kLanes;  // D, padded
  using R = Row<V>;

  Map s;
  View<const float> q, k, v, pool_k, pool_v, gates;  // gates: [B, N, H], or no data where all are 1
  const float *embedding, *temperature, *local_bias, *pool_bias, *tokens, *learnable_bias;
  const int32_t *row_start, *column;  // [U][Y]: where the row of the table starts, and [V][X]
  const RowLists* rows;
  float* stats;               // [2][B][H][N]: the maximum, and 1 / sum
  float* inverse_k;           // [B][H][N]: 1 / |k|
  float* inverse_pool_k;      // [B][H][T]
  float* unit_pool_k;         // [B][H][T][D]
  const float* log_keys;      // [N]

  // Lengths of keys of one (b, h), and its pooled keys as unit vectors.
  void measure_keys(int64_t bh) const {
    const int64_t b = bh / s.H, h = bh % s.H;
    for (int64_t n = 0; n < s.N; ++n) {
      const R row = R::from(k.at(b, h, n), s.D);
      inverse_k[bh * s.N + n] = inverse_length(row.dot(row));
    }
    for (int64_t t = 0; t < s.T; ++t) {
      const R row = R::from(pool_k.at(b, h, t), s.D);
      const float inverse = inverse_length(row.dot(row));
      inverse_pool_k[bh * s.T + t] = inverse;
      row.times(all(inverse)).to(unit_pool_k + (bh * s.T + t) * s.D, s.D);
    }
  }

  // One block of rows while it is worked on.
  struct Block {
    int64_t b, h, count, lanes;
    int32_t n[kRows], y[kRows], x[kRows];
    int32_t place[kMostPlaces][kRows];  // the key at each place of a row's window; N outside of the map
    alignas(64) float factor[kRows], inverse_q[kRows], gate[kRows];
  };

  struct Memory {
    float *unit, *scaled, *unitT, *scaledT;  // queries: [kRows][kDim] and [kDim][kRows]
    float *pooled, *local, *dynamic;         // scores or weights: [T][kRows], [L][kRows], [L][kRows]
    float *outT, *out;                       // [kDim][kRows], [kRows][kDim]
    float *grad, *gated_grad, *gradT, *d_pooled, *d_local, *d_dynamic, *weights, *dsT, *ds, *duT, *du;  // backward
    float* rows;                                      // [kRows][T]
    float *dk, *dv, *d_pool_k, *d_pool_v, *d_tokens;  // sums over the blocks of one (b, h), padded
  };

  int64_t padded_keys() const { return round_up(s.T, kLanes); }

  Memory memory(Arena& arena, bool backward) const {
    const int64_t keys = padded_keys(), L = s.places();
    Memory m{};
    for (float** tile : {&m.unit, &m.scaled, &m.unitT, &m.scaledT, &m.outT, &m.out}) *tile = arena.take<float>(kRows * kDim);
    m.pooled = arena.take<float>(kRows * keys);
    for (float** tile : {&m.local, &m.dynamic}) *tile = arena.take<float>(kRows * L);
    if (!backward) return m;
    for (float** tile : {&m.grad, &m.gated_grad, &m.gradT, &m.dsT, &m.ds, &m.duT, &m.du}) {
      *tile = arena.take<float>(kRows * kDim);
    }
    for (float** tile : {&m.d_pooled, &m.rows}) *tile = arena.take<float>(kRows * keys);
    for (float** tile : {&m.d_local, &m.d_dynamic, &m.weights}) *tile = arena.take<float>(kRows * L);
    for (float** sum : {&m.dk, &m.dv}) *sum = arena.take<float>((s.N + 1) * kDim);
    for (float** sum : {&m.d_pool_k, &m.d_pool_v}) *sum = arena.take<float>(s.T * kDim);
    m.d_tokens = arena.take<float>(L * kDim);
    return m;
  }

  // Zeros where products read lanes that no row fills.
  void clear(Memory& m, bool backward) const {
    std::memset(m.outT, 0, kRows * kDim * sizeof(float));
    if (!backward) return;
    for (float* tile : {m.dsT, m.duT}) std::memset(tile, 0, kRows * kDim * sizeof(float));
    std::memset(m.d_pooled, 0, kRows * padded_keys() * sizeof(float));
  }

  // The rows of a block: positions, keys in sight, unit and scaled queries.
  void begin(Block& block, Memory& m, const BlockOfRows& ref) const {
    block.b = ref.bk / s.H;
    block.h = ref.bk % s.H;
    block.count = ref.count;
    block.lanes = round_up(ref.count, kLanes);
    for (int64_t lane = 0; lane < kRows; ++lane) {
      const int32_t n = rows->code[ref.first + std::min(lane, ref.count - 1)];
      block.n[lane] = n;
      block.y[lane] = n / int32_t(s.X);
      block.x[lane] = n % int32_t(s.X);
      block.gate[lane] = lane >= ref.count ? 0.f : gates.data ? *gates.at(block.b, block.h, n) : 1.f;
    }
    const int32_t reach = int32_t(s.window / 2);
    for (int64_t l = 0; l < s.places(); ++l) {
      const int32_t down = int32_t(l / s.window) - reach, right = int32_t(l % s.window) - reach;
      const int32_t distance = down * int32_t(s.X) + right;
      for (int64_t lane = 0; lane < kRows; ++lane) {
        const bool inside = uint32_t(block.y[lane] + down) < uint32_t(s.Y) &&
                            uint32_t(block.x[lane] + right) < uint32_t(s.X);
        block.place[l][lane] = inside ? block.n[lane] + distance : int32_t(s.N);
      }
    }
    const R added = R::from(embedding + block.h * s.D, s.D);
    for (int64_t lane = 0; lane < kRows; ++lane) {
      R row = R::from(q.at(block.b, block.h, block.n[lane]), s.D);
      block.inverse_q[lane] = inverse_length(row.dot(row));
      block.factor[lane] = temperature[block.h] * log_keys[block.n[lane]];
      row = row.times(all(block.inverse_q[lane]));
      row.to(m.unit + lane * kDim);
      row.add(all(1.f), added);
      row.times(all(block.factor[lane])).to(m.scaled + lane * kDim);
    }
    turn(m.unit, kRows, kDim, kDim, m.unitT, kRows);
    turn(m.scaled, kRows, kDim, kDim, m.scaledT, kRows);
  }

  static void turn(const float* from, int64_t rows_, int64_t cols, int64_t ld_from, float* to, int64_t ld_to) {
    transpose_words(reinterpret_cast<const uint32_t*>(from), ld_from, rows_, cols, reinterpret_cast<uint32_t*>(to), ld_to);
  }

  const float* key_or_zeros(const View<const float>& map, const Block& block, int32_t n) const {
    alignas(64) static constexpr float zeros[kDim] = {};
    return n == s.N ? zeros : map.at(block.b, block.h, n);
  }

  // dots[l][lane]: each row times the map at each place of its window (0 outside of the map), times `factor` of that key.
  void window_products(const Block& block, const float* tile, const View<const float>& map, const float* factor,
                       float* dots) const {
    for (int64_t l = 0; l < s.places(); ++l) {
      for (int64_t lane0 = 0; lane0 < block.lanes; lane0 += kLanes) {
        Vec products[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const int32_t n = block.place[l][lane0 + i];
          const R key = R::from(key_or_zeros(map, block, n), s.D);
          products[i] = R::from(tile + (lane0 + i) * kDim).products(key);
          if (factor) products[i] *= all(n == s.N ? 0.f : factor[n]);
        }
        store(dots + l * kRows + lane0, sums_of(products));
      }
    }
  }

  // Scores of the window and of the pooled keys, and what is added to the weights of the window.
  void set_scores(const Block& block, Memory& m) const {
    const int64_t bh = block.b * s.H + block.h, L = s.places(), lanes = block.lanes;
    window_products(block, m.scaled, k, inverse_k + bh * s.N, m.local);
    const float* bias = local_bias + block.h * L;
    for (int64_t l = 0; l < L; ++l) {
      float* score = m.local + l * kRows;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        score[lane] = block.place[l][lane] == s.N ? -kInfinity : score[lane] + bias[l];
      }
    }
    set_pool_bias(block, m.pooled);  // to which the product is added
    product(s.T, lanes, s.D, {unit_pool_k + bh * s.T * s.D, s.D, 1}, m.scaledT, kRows, m.pooled, kRows, true);
    const float* token = tokens + block.h * s.D * L;
    product(L, lanes, s.D, {token, 1, L}, m.unitT, kRows, m.dynamic, kRows, false);
    const float* added = learnable_bias + block.h * L;
    for (int64_t l = 0; l < L; ++l) {
      for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        float* at = m.dynamic + l * kRows + lane;
        store(at, load(at) + added[l]);
      }
    }
  }

  void set_pool_bias(const Block& block, float* pooled) const {
    const float* table = pool_bias + block.h * s.R * s.S;
    int32_t start[kRows], of_column[kRows];
    for (int64_t u = 0; u < s.U; ++u) {
      for (int64_t lane = 0; lane < block.lanes; ++lane) start[lane] = row_start[u * s.Y + block.y[lane]];
      for (int64_t w = 0; w < s.V; ++w) {
        for (int64_t lane = 0; lane < block.lanes; ++lane) of_column[lane] = column[w * s.X + block.x[lane]];
        float* to = pooled + (u * s.V + w) * kRows;
        for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
          store(to + lane, load_at(table, load(start + lane) + load(of_column + lane)));
        }
      }
    }
  }

  void forward(Memory& m, const BlockOfRows& ref, const View<float>& out) const {
    Block block;
    begin(block, m, ref);
    set_scores(block, m);
    const int64_t L = s.places(), size = s.B * s.H * s.N, bh = block.b * s.H + block.h;
    alignas(64) float largest[kRows], inverse[kRows];
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
      Vec max = all(-kInfinity), sum = all(0.f);
      for (int64_t l = 0; l < L; ++l) max = larger(load(m.local + l * kRows + lane), max);
      for (int64_t t = 0; t < s.T; ++t) max = larger(load(m.pooled + t * kRows + lane), max);
      const auto weigh = [&](float* at) {
        const Vec weight = exp(load(at) - max);
        sum += weight;
        store(at, weight);
      };
      for (int64_t l = 0; l < L; ++l) weigh(m.local + l * kRows + lane);
      for (int64_t t = 0; t < s.T; ++t) weigh(m.pooled + t * kRows + lane);
      // Everything is divided by the sum at the end, so what is added to the weights is multiplied by it.
      for (int64_t l = 0; l < L; ++l) {
        float* at = m.local + l * kRows + lane;
        store(at, load(at) + load(m.dynamic + l * kRows + lane) * sum);
      }
      store(largest + lane, max);
      store(inverse + lane, all(1.f) / sum);
    }
    product(s.D, block.lanes, s.T, {pool_v.at(block.b, block.h, 0), 1, pool_v.row}, m.pooled, kRows, m.outT, kRows, false);
    turn(m.outT, kDim, block.lanes, kRows, m.out, kDim);
    for (int64_t lane = 0; lane < block.count; ++lane) {
      R row = R::from(m.out + lane * kDim);
      for (int64_t l = 0; l < L; ++l) {
        row.add(all(m.local[l * kRows + lane]), R::from(key_or_zeros(v, block, block.place[l][lane]), s.D));
      }
      const int64_t n = block.n[lane];
      row.times(all(inverse[lane] * block.gate[lane])).to(out.at(block.b, block.h, n), s.D);
      stats[bh * s.N + n] = largest[lane];
      stats[size + bh * s.N + n] = inverse[lane];
    }
  }

  // -------------------------------------------------------------------------------------------------------- backward
  // With g the gate, W_l = P_l + u(q) token_l + learnable bias_l, dO the gradient of the output and dP = dO v:
  //     dgate = sum W_l dP_l + sum P_t dP_t,   dS = g P (dP - sum P dP),   dW_l = g dP_l,   dv_l += g W_l dO
  //     ds = sum dS u(k),   du(k) += dS s,   du(q) = ds c log(n_keys) + sum_l dW_l token_l

  struct Gradients {
    View<float> q, k, v, pool_k, pool_v, gates;
    // Of the parameters, one for each image: [B] and the parameter's own shape.
    float *embedding, *temperature, *local_bias, *pool_bias, *tokens, *learnable_bias;
  };

  void clear_sums(Memory& m) const {
    for (float* sum : {m.dk, m.dv}) std::memset(sum, 0, (s.N + 1) * kDim * sizeof(float));
    for (float* sum : {m.d_pool_k, m.d_pool_v}) std::memset(sum, 0, s.T * kDim * sizeof(float));
    std::memset(m.d_tokens, 0, s.places() * kDim * sizeof(float));
  }

  void backward(Memory& m, const BlockOfRows& ref, const View<const float>& grad, const Gradients& to) const {
    Block block;
    begin(block, m, ref);
    set_scores(block, m);
    const int64_t L = s.places(), lanes = block.lanes, bh = block.b * s.H + block.h;
    for (int64_t lane = 0; lane < kRows; ++lane) {
      R row = R::from(grad.at(block.b, block.h, block.n[lane]), s.D);
      row.to(m.grad + lane * kDim);
      row.times(all(block.gate[lane])).to(m.gated_grad + lane * kDim);
    }
    turn(m.grad, kRows, kDim, kDim, m.gradT, kRows);
    window_products(block, m.grad, v, nullptr, m.d_local);
    product(s.T, lanes, s.D, {pool_v.at(block.b, block.h, 0), pool_v.row, 1}, m.gradT, kRows, m.d_pooled, kRows, false);
    differentiate(block, m, to);

    product(s.T, kDim, block.count, {m.d_pooled, kRows, 1}, m.scaled, kDim, m.d_pool_k, kDim, true);
    product(s.T, kDim, block.count, {m.pooled, kRows, 1}, m.gated_grad, kDim, m.d_pool_v, kDim, true);
    product(L, kDim, block.count, {m.d_dynamic, kRows, 1}, m.unit, kDim, m.d_tokens, kDim, true);
    product(s.D, lanes, s.T, {unit_pool_k + bh * s.T * s.D, 1, s.D}, m.d_pooled, kRows, m.dsT, kRows, false);
    product(s.D, lanes, L, {tokens + block.h * s.D * L, L, 1}, m.d_dynamic, kRows, m.duT, kRows, false);
    turn(m.dsT, kDim, lanes, kRows, m.ds, kDim);
    turn(m.duT, kDim, lanes, kRows, m.du, kDim);
    add_pool_bias(block, m, to.pool_bias + bh * s.R * s.S);
    finish_rows(block, m, to);
  }

  // Scores and dP -> P and dS (in place), W g, dW, and the gradients of gates and of what is added to the window.
  void differentiate(const Block& block, Memory& m, const Gradients& to) const {
    const int64_t L = s.places(), size = s.B * s.H * s.N, bh = block.b * s.H + block.h, at_stats = bh * s.N;
    alignas(64) float max[kRows], inverse[kRows], d_gate[kRows];
    for (int64_t lane = 0; lane < kRows; ++lane) {  // a lane without a row has no weights
      max[lane] = lane < block.count ? stats[at_stats + block.n[lane]] : kInfinity;
      inverse[lane] = lane < block.count ? stats[size + at_stats + block.n[lane]] : 0.f;
    }
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
      const Vec largest = load(max + lane), factor = load(inverse + lane), gate = load(block.gate + lane);
      Vec delta = all(0.f), extra = all(0.f);
      const auto weigh = [&](float* at, const float* d_at) {
        const Vec p = exp(load(at) - largest) * factor;
        delta += p * load(d_at);
        store(at, p);
      };
      for (int64_t l = 0; l < L; ++l) {
        const int64_t at = l * kRows + lane;
        weigh(m.local + at, m.d_local + at);
        extra += load(m.dynamic + at) * load(m.d_local + at);
        store(m.weights + at, (load(m.local + at) + load(m.dynamic + at)) * gate);
        store(m.d_dynamic + at, load(m.d_local + at) * gate);
      }
      for (int64_t t = 0; t < s.T; ++t) weigh(m.pooled + t * kRows + lane, m.d_pooled + t * kRows + lane);
      const auto derive = [&](const float* at, float* d_at) { store(d_at, load(at) * gate * (load(d_at) - delta)); };
      for (int64_t l = 0; l < L; ++l) derive(m.local + l * kRows + lane, m.d_local + l * kRows + lane);
      for (int64_t t = 0; t < s.T; ++t) derive(m.pooled + t * kRows + lane, m.d_pooled + t * kRows + lane);
      store(d_gate + lane, delta + extra);
    }
    for (int64_t l = 0; l < L; ++l) {
      Vec bias = all(0.f), added = all(0.f);
      for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
        bias += load(m.d_local + l * kRows + lane);
        added += load(m.d_dynamic + l * kRows + lane);
      }
      to.local_bias[bh * L + l] += sum_of(bias);
      to.learnable_bias[bh * L + l] += sum_of(added);
    }
    if (!to.gates.data) return;
    for (int64_t lane = 0; lane < block.count; ++lane) *to.gates.at(block.b, block.h, block.n[lane]) = d_gate[lane];
  }

  void add_pool_bias(const Block& block, Memory& m, float* table) const {
    const int64_t keys = padded_keys();
    turn(m.d_pooled, keys, block.lanes, kRows, m.rows, keys);
    for (int64_t lane = 0; lane < block.count; ++lane) {
      const float* from = m.rows + lane * keys;
      for (int64_t u = 0; u < s.U; ++u) {
        float* to = table + row_start[u * s.Y + block.y[lane]];
        for (int64_t w = 0; w < s.V; ++w) to[column[w * s.X + block.x[lane]]] += *from++;
      }
    }
  }

  // The window's part of ds, du(k) and dv, and from ds and du(q) the gradient of the query, embedding and temperature.
  void finish_rows(const Block& block, Memory& m, const Gradients& to) const {
    const int64_t L = s.places(), bh = block.b * s.H + block.h;
    const R added = R::from(embedding + block.h * s.D, s.D);
    R d_embedding = R::zero();
    Vec d_temperature = all(0.f);
    for (int64_t lane = 0; lane < block.count; ++lane) {
      const R scaled = R::from(m.scaled + lane * kDim), grad = R::from(m.grad + lane * kDim);
      R unit = R::from(m.unit + lane * kDim), ds = R::from(m.ds + lane * kDim), du = R::from(m.du + lane * kDim);
      for (int64_t l = 0; l < L; ++l) {
        const int32_t n = block.place[l][lane];
        if (n == s.N) continue;
        const float d_score = m.d_local[l * kRows + lane];
        ds.add(all(d_score * inverse_k[bh * s.N + n]), R::from(k.at(block.b, block.h, n), s.D));
        R dk = R::from(m.dk + n * kDim), dv = R::from(m.dv + n * kDim);
        dk.add(all(d_score), scaled);
        dv.add(all(m.weights[l * kRows + lane]), grad);
        dk.to(m.dk + n * kDim);
        dv.to(m.dv + n * kDim);
      }
      const Vec factor = all(block.factor[lane]);
      du.add(factor, ds);
      d_embedding.add(factor, ds);
      R embedded = unit;
      embedded.add(all(1.f), added);
      d_temperature += embedded.products(ds) * all(log_keys[block.n[lane]]);
      through_unit(du, unit, block.inverse_q[lane]).to(to.q.at(block.b, block.h, block.n[lane]), s.D);
    }
    float* embedding_sum = to.embedding + bh * s.D;
    R sum = R::from(embedding_sum, s.D);
    sum.add(all(1.f), d_embedding);
    sum.to(embedding_sum, s.D);
    to.temperature[bh] += sum_of(d_temperature);
  }

  // Sums over the blocks of one (b, h) -> gradients of its keys and values, and of the tokens.
  void finish_head(Memory& m, int64_t b, int64_t h, const Gradients& to) const {
    const int64_t bh = b * s.H + h, L = s.places();
    for (int64_t n = 0; n < s.N; ++n) {
      const float inverse = inverse_k[bh * s.N + n];
      const R unit = R::from(k.at(b, h, n), s.D).times(all(inverse));
      through_unit(R::from(m.dk + n * kDim), unit, inverse).to(to.k.at(b, h, n), s.D);
      R::from(m.dv + n * kDim).to(to.v.at(b, h, n), s.D);
    }
    for (int64_t t = 0; t < s.T; ++t) {
      const R unit = R::from(unit_pool_k + (bh * s.T + t) * s.D, s.D);
      through_unit(R::from(m.d_pool_k + t * kDim), unit, inverse_pool_k[bh * s.T + t]).to(to.pool_k.at(b, h, t), s.D);
      R::from(m.d_pool_v + t * kDim).to(to.pool_v.at(b, h, t), s.D);
    }
    for (int64_t d = 0; d < s.D; ++d) {
      for (int64_t l = 0; l < L; ++l) to.tokens[(bh * s.D + d) * L + l] += m.d_tokens[l * kDim + d];
    }
  }
};

}  // namespace mixhead
