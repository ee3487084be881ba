// The PyTorch side of aggregated attention: tensors to views, threads, and the two operators of the library `mixhead`.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <memory>

#include "aggregated.h"

namespace mixhead {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor unit_stride(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

View<const float> view(const Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)}; }
View<float> writable(const Tensor& x) { return {x.data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)}; }

// The rows of every (b, h) that select it, in order.
RowLists list_rows(const Map& s, const OptionalTensor& selected) {
  const int64_t lists = s.B * s.H;
  const bool* data = selected ? selected->const_data_ptr<bool>() : nullptr;
  RowLists rows;
  rows.start.assign(lists + 1, 0);
  rows.code.reserve(lists * s.N + 1);
  for (int64_t bh = 0; bh < lists; ++bh) {
    for (int64_t n = 0; n < s.N; ++n) {
      if (!data || data[bh / s.H * selected->stride(0) + n * selected->stride(1) + bh % s.H * selected->stride(2)]) {
        rows.code.push_back(int32_t(n));
      }
    }
    rows.start[bh + 1] = int64_t(rows.code.size());
  }
  return rows;
}

// Logarithm of the number of keys that each place of the map sees.
std::vector<float> log_of_keys(const Map& s) {
  std::vector<float> logs;
  const int64_t reach = s.window / 2;
  const auto overlap = [&](int64_t at, int64_t length) {
    return std::min(at + reach, length - 1) - std::max<int64_t>(at - reach, 0) + 1;
  };
  for (int64_t y = 0; y < s.Y; ++y) {
    for (int64_t x = 0; x < s.X; ++x) logs.push_back(std::log(float(overlap(y, s.Y) * overlap(x, s.X) + s.T)));
  }
  return logs;
}

// Indices [queries][keys] below `limit`, as [keys][queries] and times `factor`.
std::vector<int32_t> turned(const Tensor& index, int64_t limit, int64_t factor) {
  const int64_t queries = index.size(0), keys = index.size(1);
  const int64_t* data = index.const_data_ptr<int64_t>();
  std::vector<int32_t> to(queries * keys);
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = data[i * index.stride(0) + j * index.stride(1)];
      TORCH_CHECK(at >= 0 && at < limit, "an index of the pool bias lies outside of its table");
      to[j * queries + i] = int32_t(at * factor);
    }
  }
  return to;
}

// The inputs of one call, as the kernel wants them.
struct Call {
  Tensor q, k, v, pool_k, pool_v;
  OptionalTensor gates, selected;
  Tensor embedding, temperature, local_bias, pool_bias, tokens, learnable_bias;
  Map s;
  RowLists rows;
  std::vector<BlockOfRows> blocks;
  std::vector<float> logs;
  std::vector<int32_t> row_start, column;
  std::unique_ptr<float[]> lengths;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& pool_k_, const Tensor& pool_v_,
       const OptionalTensor& gates_, const OptionalTensor& selected_, int64_t Y, const Tensor& embedding_,
       const Tensor& temperature_, const Tensor& local_bias_, const Tensor& pool_bias_, const Tensor& tokens_,
       const Tensor& learnable_bias_, const Tensor& row_index, const Tensor& column_index)
      : q(unit_stride(q_)), k(unit_stride(k_)), v(unit_stride(v_)), pool_k(unit_stride(pool_k_)),
        pool_v(unit_stride(pool_v_)), gates(gates_), selected(selected_), embedding(embedding_.contiguous()),
        temperature(temperature_.contiguous()), local_bias(local_bias_.contiguous()),
        pool_bias(pool_bias_.contiguous()), tokens(tokens_.contiguous()), learnable_bias(learnable_bias_.contiguous()) {
    const int64_t window = std::lround(std::sqrt(double(local_bias.size(1))));
    s = {q.size(0), q.size(1), q.size(2), pool_k.size(2), q.size(3), Y, q.size(2) / Y, window,
         row_index.size(1), column_index.size(1), pool_bias.size(1), pool_bias.size(2)};
    TORCH_CHECK(s.places() <= kMostPlaces, "the window has more than ", kMostPlaces, " places");
    TORCH_CHECK(s.D <= kMostVectors * kLanes, "heads are wider than ", kMostVectors * kLanes);
    rows = list_rows(s, selected);
    blocks = cut_into_blocks(rows);
    logs = log_of_keys(s);
    row_start = turned(row_index, s.R, s.S);
    column = turned(column_index, s.S, 1);
    lengths.reset(new float[s.B * s.H * (s.N + s.T + s.T * s.D)]);
  }

  template <int V>
  Aggregated<V> kernel(const Tensor& stats) {
    Aggregated<V> kernel;
    kernel.s = s;
    kernel.q = view(q);
    kernel.k = view(k);
    kernel.v = view(v);
    kernel.pool_k = view(pool_k);
    kernel.pool_v = view(pool_v);
    kernel.gates = {};
    if (gates) kernel.gates = {gates->const_data_ptr<float>(), gates->stride(0), gates->stride(2), gates->stride(1)};
    kernel.embedding = embedding.const_data_ptr<float>();
    kernel.temperature = temperature.const_data_ptr<float>();
    kernel.local_bias = local_bias.const_data_ptr<float>();
    kernel.pool_bias = pool_bias.const_data_ptr<float>();
    kernel.tokens = tokens.const_data_ptr<float>();
    kernel.learnable_bias = learnable_bias.const_data_ptr<float>();
    kernel.row_start = row_start.data();
    kernel.column = column.data();
    kernel.rows = &rows;
    kernel.stats = stats.data_ptr<float>();
    kernel.inverse_k = lengths.get();
    kernel.inverse_pool_k = kernel.inverse_k + s.B * s.H * s.N;
    kernel.unit_pool_k = kernel.inverse_pool_k + s.B * s.H * s.T;
    kernel.log_keys = logs.data();
    at::parallel_for(0, s.B * s.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t bh = begin; bh < end; ++bh) kernel.measure_keys(bh);
    });
    return kernel;
  }
};

// Zeros in the rows of [B, H, N, D] that no token selects.
void clear_unselected(const Call& call, const View<float>& out) {
  if (!call.selected) return;
  const Map& s = call.s;
  const bool* data = call.selected->const_data_ptr<bool>();
  const int64_t sb = call.selected->stride(0), sn = call.selected->stride(1), sh = call.selected->stride(2);
  at::parallel_for(0, s.B * s.N, 256, [&](int64_t begin, int64_t end) {
    for (int64_t bn = begin; bn < end; ++bn) {
      for (int64_t h = 0; h < s.H; ++h) {
        const int64_t b = bn / s.N, n = bn % s.N;
        if (!data[b * sb + n * sn + h * sh]) std::memset(out.at(b, h, n), 0, s.D * sizeof(float));
      }
    }
  });
}

template <int V>
void run_forward(Call& call, const Tensor& out, const Tensor& stats) {
  const Aggregated<V> kernel = call.kernel<V>(stats);
  const View<float> to = writable(out);
  clear_unselected(call, to);
  at::parallel_for(0, int64_t(call.blocks.size()), 1, [&](int64_t begin, int64_t end) {
    Arena arena(kernel.bytes(false));
    auto memory = kernel.memory(arena, false);
    for (int64_t i = begin; i < end; ++i) kernel.forward(memory, call.blocks[i], to);
  });
}

// A thread takes whole heads of an image. The images' gradients of parameters are added up afterwards, so that the order
// never depends on the threads.
template <int V>
void run_backward(Call& call, const Tensor& grad, const Tensor& stats, const typename Aggregated<V>::Gradients& to) {
  const Aggregated<V> kernel = call.kernel<V>(stats);
  const Map& s = call.s;
  const View<const float> from = view(grad);
  clear_unselected(call, to.q);
  std::vector<size_t> first(s.B * s.H + 1, 0);
  for (const BlockOfRows& block : call.blocks) ++first[block.bk + 1];
  for (int64_t bh = 0; bh < s.B * s.H; ++bh) first[bh + 1] += first[bh];
  at::parallel_for(0, s.B * s.H, 1, [&](int64_t begin, int64_t end) {
    Arena arena(kernel.bytes(true));
    auto memory = kernel.memory(arena, true);
    for (int64_t bh = begin; bh < end; ++bh) {
      kernel.clear_sums(memory);
      for (size_t i = first[bh]; i < first[bh + 1]; ++i) kernel.backward(memory, call.blocks[i], from, to);
      kernel.finish_head(memory, bh / s.H, bh % s.H, to);
    }
  });
}

// Calls `body` with the number of vectors that a head takes.
template <int V = 1, class Body>
void with_vectors(int64_t D, Body body) {
  if (V == kMostVectors || D <= V * kLanes) {
    body(std::integral_constant<int, V>{});
  } else if constexpr (V < kMostVectors) {
    with_vectors<V + 1>(D, body);
  }
}

Tensor empty_by_token(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

std::tuple<Tensor, Tensor> aggregate(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pool_k,
                                     const Tensor& pool_v, const OptionalTensor& gates, const OptionalTensor& selected,
                                     int64_t Y, const Tensor& embedding, const Tensor& temperature,
                                     const Tensor& local_bias, const Tensor& pool_bias, const Tensor& tokens,
                                     const Tensor& learnable_bias, const Tensor& row_index,
                                     const Tensor& column_index) {
  Call call(q, k, v, pool_k, pool_v, gates, selected, Y, embedding, temperature, local_bias, pool_bias, tokens,
            learnable_bias, row_index, column_index);
  Tensor out = empty_by_token(q), stats = at::zeros({2, q.size(0), q.size(1), q.size(2)}, q.options());
  with_vectors(call.s.D, [&](auto vectors) { run_forward<vectors.value>(call, out, stats); });
  return {out, stats};
}

std::vector<Tensor> aggregate_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& pool_k, const Tensor& pool_v, const OptionalTensor& gates,
                                       const OptionalTensor& selected, int64_t Y, const Tensor& embedding,
                                       const Tensor& temperature, const Tensor& local_bias, const Tensor& pool_bias,
                                       const Tensor& tokens, const Tensor& learnable_bias, const Tensor& row_index,
                                       const Tensor& column_index, const Tensor& stats) {
  Call call(q, k, v, pool_k, pool_v, gates, selected, Y, embedding, temperature, local_bias, pool_bias, tokens,
            learnable_bias, row_index, column_index);
  std::vector<Tensor> d;
  for (const Tensor* x : {&q, &k, &v, &pool_k, &pool_v}) d.push_back(empty_by_token(*x));
  d.push_back(gates ? at::zeros(gates->sizes(), gates->options()) : at::zeros({0}, q.options()));
  for (const Tensor* x : {&embedding, &temperature, &local_bias, &pool_bias, &tokens, &learnable_bias}) {
    std::vector<int64_t> sizes = x->sizes().vec();
    sizes.insert(sizes.begin(), q.size(0));
    d.push_back(at::zeros(sizes, x->options()));
  }
  View<float> d_gates;
  if (gates) d_gates = {d[5].data_ptr<float>(), d[5].stride(0), d[5].stride(2), d[5].stride(1)};
  const Tensor from = unit_stride(grad);
  with_vectors(call.s.D, [&](auto vectors) {
    run_backward<vectors.value>(call, from, stats,
                                {writable(d[0]), writable(d[1]), writable(d[2]), writable(d[3]), writable(d[4]), d_gates,
                                 d[6].data_ptr<float>(), d[7].data_ptr<float>(), d[8].data_ptr<float>(),
                                 d[9].data_ptr<float>(), d[10].data_ptr<float>(), d[11].data_ptr<float>()});
  });
  for (size_t i = 6; i < d.size(); ++i) d[i] = d[i].sum(0);
  return d;
}

}  // namespace

// The schemas, the fake and the autograd formulas are in Python, where they need no compiler.
TORCH_LIBRARY_IMPL(mixhead, CPU, library) {
  library.impl("aggregate_cpu", aggregate);
  library.impl("aggregate_cpu_backward", aggregate_backward);
}

}  // namespace mixhead
