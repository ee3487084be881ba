// The PyTorch side of aggregated attention: tensors to views, threads, and the two operators of the library `mixhead`.

#include <cmath>
#include <memory>

#include "aggregated.h"
#include "tensor.h"

namespace mixhead {
namespace {

// The rows of every (b, h) that select it, in order.
RowLists list_rows(const Map& s, const OptionalTensor& selected) {
  const int64_t lists = s.B * s.H;
  const View<const bool> of = selected ? view_of_gates<const bool>(*selected) : View<const bool>{};
  RowLists rows;
  rows.start.assign(lists + 1, 0);
  rows.code.reserve(lists * s.N + 1);
  for (int64_t bh = 0; bh < lists; ++bh) {
    for (int64_t n = 0; n < s.N; ++n) {
      if (!of.data || *of.at(bh / s.H, bh % s.H, n)) rows.code.push_back(int32_t(n));
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
  const int64_t *data = data_of<const int64_t>(index), row = index.stride(0), column = index.stride(1);
  std::vector<int32_t> to(queries * keys);
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = data[i * row + j * column];
      require(at >= 0 && at < limit, "an index of the pool bias lies outside of its table");
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
        pool_v(unit_stride(pool_v_)), gates(gates_), selected(selected_), embedding(as_contiguous(embedding_)),
        temperature(as_contiguous(temperature_)), local_bias(as_contiguous(local_bias_)),
        pool_bias(as_contiguous(pool_bias_)), tokens(as_contiguous(tokens_)), learnable_bias(as_contiguous(learnable_bias_)) {
    const int64_t window = std::lround(std::sqrt(double(local_bias.size(1))));
    s = {q.size(0), q.size(1), q.size(2), pool_k.size(2), q.size(3), Y, q.size(2) / Y, window,
         row_index.size(1), column_index.size(1), pool_bias.size(1), pool_bias.size(2)};
    require(s.places() <= kMostPlaces, "the window has too many places");
    require(s.D <= kMostVectors * kLanes, "the heads are too wide");
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
    kernel.q = view<const float>(q);
    kernel.k = view<const float>(k);
    kernel.v = view<const float>(v);
    kernel.pool_k = view<const float>(pool_k);
    kernel.pool_v = view<const float>(pool_v);
    kernel.gates = {};
    if (gates) kernel.gates = view_of_gates<const float>(*gates);
    kernel.embedding = data_of<const float>(embedding);
    kernel.temperature = data_of<const float>(temperature);
    kernel.local_bias = data_of<const float>(local_bias);
    kernel.pool_bias = data_of<const float>(pool_bias);
    kernel.tokens = data_of<const float>(tokens);
    kernel.learnable_bias = data_of<const float>(learnable_bias);
    kernel.row_start = row_start.data();
    kernel.column = column.data();
    kernel.rows = &rows;
    kernel.stats = data_of<float>(stats);
    kernel.inverse_k = lengths.get();
    kernel.inverse_pool_k = kernel.inverse_k + s.B * s.H * s.N;
    kernel.unit_pool_k = kernel.inverse_pool_k + s.B * s.H * s.T;
    kernel.log_keys = logs.data();
    parallel_for(s.B * s.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t bh = begin; bh < end; ++bh) kernel.measure_keys(bh);
    });
    return kernel;
  }
};

// Zeros in the rows of [B, H, N, D] that no token selects.
void clear_unselected(const Call& call, const View<float>& out) {
  if (!call.selected) return;
  const Map& s = call.s;
  const View<const bool> selected = view_of_gates<const bool>(*call.selected);
  parallel_for(s.B * s.N, 256, [&](int64_t begin, int64_t end) {
    for (int64_t bn = begin; bn < end; ++bn) {
      for (int64_t h = 0; h < s.H; ++h) {
        const int64_t b = bn / s.N, n = bn % s.N;
        if (!*selected.at(b, h, n)) std::memset(out.at(b, h, n), 0, s.D * sizeof(float));
      }
    }
  });
}

template <int V>
void run_forward(Call& call, const Tensor& out, const Tensor& stats) {
  const Aggregated<V> kernel = call.kernel<V>(stats);
  const View<float> to = view<float>(out);
  clear_unselected(call, to);
  parallel_for(int64_t(call.blocks.size()), 1, [&](int64_t begin, int64_t end) {
    Workspace space([&](Arena& arena) { return kernel.memory(arena, false); });
    kernel.clear(space.memory, false);
    for (int64_t i = begin; i < end; ++i) kernel.forward(space.memory, call.blocks[i], to);
  });
}

// A thread takes whole heads of an image. The images' gradients of parameters are added up afterwards, so that the order
// never depends on the threads.
template <int V>
void run_backward(Call& call, const Tensor& grad, const Tensor& stats, const typename Aggregated<V>::Gradients& to) {
  const Aggregated<V> kernel = call.kernel<V>(stats);
  const Map& s = call.s;
  const View<const float> from = view<const float>(grad);
  clear_unselected(call, to.q);
  std::vector<size_t> first(s.B * s.H + 1, 0);
  for (const BlockOfRows& block : call.blocks) ++first[block.bk + 1];
  for (int64_t bh = 0; bh < s.B * s.H; ++bh) first[bh + 1] += first[bh];
  parallel_for(s.B * s.H, 1, [&](int64_t begin, int64_t end) {
    Workspace space([&](Arena& arena) { return kernel.memory(arena, true); });
    auto& memory = space.memory;
    kernel.clear(memory, true);
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

std::tuple<Tensor, Tensor> aggregate(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pool_k,
                                     const Tensor& pool_v, const OptionalTensor& gates, const OptionalTensor& selected,
                                     int64_t Y, const Tensor& embedding, const Tensor& temperature,
                                     const Tensor& local_bias, const Tensor& pool_bias, const Tensor& tokens,
                                     const Tensor& learnable_bias, const Tensor& row_index,
                                     const Tensor& column_index) {
  Call call(q, k, v, pool_k, pool_v, gates, selected, Y, embedding, temperature, local_bias, pool_bias, tokens,
            learnable_bias, row_index, column_index);
  Tensor out = empty_by_token(q), stats = zeros({2, q.size(0), q.size(1), q.size(2)}, q.scalar_type());
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
  d.push_back(gates ? zeros(gates->sizes(), gates->scalar_type()) : empty({0}, q.scalar_type()));
  for (const Tensor* x : {&embedding, &temperature, &local_bias, &pool_bias, &tokens, &learnable_bias}) {
    std::vector<int64_t> sizes(x->sizes().begin(), x->sizes().end());
    sizes.insert(sizes.begin(), q.size(0));
    d.push_back(zeros(sizes, x->scalar_type()));
  }
  View<float> d_gates;
  if (gates) d_gates = view_of_gates<float>(d[5]);
  const Tensor from = unit_stride(grad);
  with_vectors(call.s.D, [&](auto vectors) {
    run_backward<vectors.value>(call, from, stats,
                                {view<float>(d[0]), view<float>(d[1]), view<float>(d[2]), view<float>(d[3]), view<float>(d[4]), d_gates,
                                 data_of<float>(d[6]), data_of<float>(d[7]), data_of<float>(d[8]),
                                 data_of<float>(d[9]), data_of<float>(d[10]), data_of<float>(d[11])});
  });
  for (size_t i = 6; i < d.size(); ++i) d[i] = sum_of_images(d[i]);
  return d;
}

}  // namespace

// The schemas, the fake and the autograd formulas are in Python, where they need no compiler.
STABLE_TORCH_LIBRARY_IMPL(mixhead, CPU, library) {
  library.impl("aggregate_cpu", MIXHEAD_OPERATOR(aggregate));
  library.impl("aggregate_cpu_backward", MIXHEAD_OPERATOR(aggregate_backward));
}

}  // namespace mixhead
