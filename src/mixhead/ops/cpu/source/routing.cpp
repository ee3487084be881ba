// The PyTorch side of routing: a linear router as one operator, alone and with the attention of one new token, the gates
// of heads that are all computed, and the constants of skipped ones.
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "call.h"
#include "routing.h"

namespace mixhead {
namespace {

// Tokens that a thread takes at least.
constexpr int64_t kGrain = 64;

// A linear router's tensors, and what it selects.
struct Router {
  Tensor hidden, weight, bias, shared;
  HeadChoice choice;
  int64_t tokens, C;

  Router(const Tensor& hidden_, const Tensor& weight_, const Tensor& bias_, const Tensor& shared_, int64_t active,
         int64_t groups)
      : hidden(as_contiguous(hidden_)), weight(as_contiguous(weight_)), bias(as_contiguous(bias_)),
        shared(as_contiguous(shared_)) {
    require(hidden.dim() == 3 && weight.dim() == 2 && bias.dim() == 1 && shared.dim() == 1,
            "hidden states must have 3 dimensions, the weight 2, the bias and the shared heads 1");
    const int64_t H = weight.size(0);
    tokens = hidden.size(0) * hidden.size(1);
    C = hidden.size(2);
    require(weight.size(1) == C && bias.size(0) == H && shared.size(0) == H,
            "the shapes of hidden states, weight, bias and shared heads do not fit");
    require(groups > 0 && active >= 0 && H % groups == 0 && active % groups == 0, "groups must divide the heads");
    const ScalarType dtype = hidden.scalar_type();
    require((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && weight.scalar_type() == dtype &&
            bias.scalar_type() == dtype && shared.scalar_type() == ScalarType::Bool,
            "hidden states and the router must be float32 or bfloat16, and the shared heads boolean");
    choice = {H, groups, active / groups, data_of<const bool>(shared)};
  }

  // Room for one token.
  struct Memory {
    std::vector<float> scores, ranked;
    std::vector<int32_t> before;
    explicit Memory(int64_t H) : scores(H), ranked(H), before(H) {}
  };

  template <class In>
  void select(Memory& m, int64_t token, bool* selected) const {
    const In *x = data_of<const In>(hidden) + token * C, *rows = data_of<const In>(weight);
    const In* offsets = data_of<const In>(bias);
    for (int64_t h = 0; h < choice.H; ++h) m.scores[h] = dot(x, rows + h * C, C) + widen(offsets[h]);
    choice.rank(m.scores.data(), m.ranked.data());
    choice.select(m.ranked.data(), m.before.data(), selected);
  }
};

template <class In>
void route_tokens(const Router& router, float* gates, bool* selected, float* probs) {
  const int64_t H = router.choice.H;
  parallel_for(router.tokens, kGrain, [&](int64_t begin, int64_t end) {
    Router::Memory memory(H);
    for (int64_t token = begin; token < end; ++token) {
      router.select<In>(memory, token, selected + token * H);
      for (int64_t h = token * H; h < (token + 1) * H; ++h) gates[h] = selected[h] ? 1.f : 0.f;
      router.choice.probabilities(memory.scores.data(), probs + token * H);
    }
  });
}

// (gates, selected heads, probabilities), each [B, N, H].
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                                         const Tensor& shared, int64_t active, int64_t groups) {
  const Router router(hidden, weight, bias, shared, active, groups);
  const int64_t sizes[] = {hidden.size(0), hidden.size(1), router.choice.H};
  const Tensor gates = empty(sizes, ScalarType::Float);
  const Tensor selected = empty(sizes, ScalarType::Bool);
  const Tensor probs = empty(sizes, ScalarType::Float);
  const bool wide = hidden.scalar_type() == ScalarType::Float;
  (wide ? route_tokens<float> : route_tokens<BFloat>)(router, data_of<float>(gates), data_of<bool>(selected),
                                                     data_of<float>(probs));
  return {gates, selected, probs};
}

// Outputs of all heads times their gates, and zero where a token skips a head.
template <class T>
void gate_rows(const Tensor& out, const Tensor& gates, const Tensor& selected) {
  const View<T> rows = view<T>(out);
  const View<const T> factors = view_of_gates<const T>(gates);
  const View<const bool> chosen = view_of_gates<const bool>(selected);
  const int64_t H = out.size(1), N = out.size(2), D = out.size(3);
  parallel_for(out.size(0) * N, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / N, n = token % N;
      for (int64_t h = 0; h < H; ++h) {
        T* row = rows.at(b, h, n);
        const float gate = widen(*factors.at(b, h, n));
        if (!*chosen.at(b, h, n)) {
          std::memset(static_cast<void*>(row), 0, D * sizeof(T));
        } else if (gate != 1.f) {
          copy_row(row, D, gate, row);
        }
      }
    }
  });
}

// The same in place for `out` [B, H, N, D], of gates and selected heads [B, N, H].
void gate_heads(Tensor out, const Tensor& gates, const Tensor& selected) {
  const Sizes sizes = out.sizes();
  require(out.dim() == 4 && same(gates.sizes(), {sizes[0], sizes[2], sizes[1]}) && same(selected.sizes(), gates.sizes()),
          "the shapes of the heads' outputs, the gates and the selection do not fit");
  const ScalarType dtype = out.scalar_type();
  require((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && gates.scalar_type() == dtype &&
          selected.scalar_type() == ScalarType::Bool && out.stride(3) == 1,
          "outputs and gates must be float32 or bfloat16, the selection boolean, and a head's numbers side by side");
  (dtype == ScalarType::Float ? gate_rows<float> : gate_rows<BFloat>)(out, gates, selected);
}

// Constants of H rows into `out`, where a row is not selected.
void fill(char* out, const bool* selected, const char* constants, int64_t rows, int64_t H, int64_t bytes) {
  for (int64_t row = 0; row < rows; ++row) {
    if (!selected[row]) std::memcpy(out + row * bytes, constants + row % H * bytes, bytes);
  }
}

// Writes the constants [H, D] into `out` [B, N, H, D] where a token skips a head.
void fill_skipped(Tensor out, const Tensor& selected, const Tensor& skipped) {
  const Sizes sizes = out.sizes();
  require(out.dim() == 4 && same(selected.sizes(), {sizes[0], sizes[1], sizes[2]}) &&
          same(skipped.sizes(), {sizes[2], sizes[3]}),
          "the shapes of the heads' outputs, the selection and the constants do not fit");
  require(out.scalar_type() == skipped.scalar_type() && selected.scalar_type() == ScalarType::Bool &&
          out.is_contiguous() && selected.is_contiguous() && skipped.is_contiguous(),
          "outputs and constants must be of one dtype, the selection boolean, and all contiguous");
  const int64_t H = out.size(2), bytes = out.size(3) * int64_t(out.element_size());
  char* to = data_of<char>(out);
  const char* from = data_of<const char>(skipped);
  const bool* chosen = data_of<const bool>(selected);
  parallel_for(out.size(0) * out.size(1), kGrain, [&](int64_t begin, int64_t end) {
    fill(to + begin * H * bytes, chosen + begin * H, from, (end - begin) * H, H, bytes);
  });
}

// One new token of every sequence.
template <class In>
void decode_tokens(const Router& router, const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool* selected,
                   const Tensor& out) {
  const int64_t B = q.size(0), H = q.size(1);
  Router::Memory memory(H);
  for (int64_t b = 0; b < B; ++b) router.select<In>(memory, b, selected + b * H);
  std::vector<In> gates(B * H);
  for (In& gate : gates) narrow(1.f, &gate);  // Nobody reads those of skipped heads.
  Decode<In> decode;
  decode.s = shape_of(q, k, false, scale);
  decode.q = view<const In>(q);
  decode.k = view<const In>(k);
  decode.v = view<const In>(v);
  decode.gates = {gates.data(), H, 1, H};
  decode.selected = {selected, H, 1, H};
  decode.out = {data_of<In>(out), out.stride(0), out.stride(2), out.stride(1)};
  decode.stats = nullptr;
  run(decode);
}

void check_decoding(const Router& router, const OptionalTensor& skipped, const Tensor& q, const Tensor& k, const Tensor& v) {
  const ScalarType dtype = router.hidden.scalar_type();
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(2) == 1 && router.hidden.size(1) == 1,
          "queries, keys and values must have 4 dimensions, and there must be one new token");
  const int64_t B = q.size(0), H = q.size(1), K = k.size(1), T = k.size(2), D = q.size(3);
  require(router.hidden.size(0) == B && router.choice.H == H && K > 0 && H % K == 0 && H / K <= kMostRows && T > 0 &&
          D > 0 && same(k.sizes(), {B, K, T, D}) && same(v.sizes(), k.sizes()),
          "the shapes of hidden states, router, queries, keys and values do not fit");
  require(q.scalar_type() == dtype && k.scalar_type() == dtype && v.scalar_type() == dtype && q.stride(3) == 1 &&
          k.stride(3) == 1 && v.stride(3) == 1,
          "hidden states, queries, keys and values must be of one dtype, with the head's numbers side by side");
  require(!skipped || (same(skipped->sizes(), {H, D}) && skipped->is_contiguous() && skipped->scalar_type() == dtype),
          "the constants of skipped heads do not fit");
}

// Routes one new token of every sequence, attends for the heads that it selects, and fills in the others: [B, 1, H, D].
Tensor decode(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& shared,
              const OptionalTensor& skipped, const Tensor& q, const Tensor& k, const Tensor& v, int64_t active,
              int64_t groups, double scale) {
  const Router router(hidden, weight, bias, shared, active, groups);
  check_decoding(router, skipped, q, k, v);
  const int64_t B = q.size(0), H = q.size(1), D = q.size(3), sizes[] = {B, 1, H, D};
  const Tensor out = empty(sizes, q.scalar_type());
  const std::unique_ptr<bool[]> selected(new bool[B * H]);
  const bool wide = q.scalar_type() == ScalarType::Float;
  (wide ? decode_tokens<float> : decode_tokens<BFloat>)(router, q, k, v, scale, selected.get(), out);
  if (skipped) {
    fill(data_of<char>(out), selected.get(), data_of<const char>(*skipped), B * H, H, D * int64_t(out.element_size()));
  }
  return out;
}

}  // namespace

// The schemas and what runs without a compiler are in Python.
STABLE_TORCH_LIBRARY_IMPL(mixhead, CPU, library) {
  library.impl("route_linear_cpu", MIXHEAD_OPERATOR(route));
  library.impl("gate_heads_cpu", MIXHEAD_OPERATOR(gate_heads));
  library.impl("fill_skipped_cpu", MIXHEAD_OPERATOR(fill_skipped));
  library.impl("decode_routed_cpu", MIXHEAD_OPERATOR(decode));
}

}  // namespace mixhead
