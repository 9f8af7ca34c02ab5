// The largest affinity of a matrix in double precision. It divides every entry, so that what it
// loses to rounding is lost in all of them alike, and is what is left where s and t nearly agree.
#pragma once

#include "states.cuh"

namespace affkd::cuda {

// By all threads of a block: sum_d q_d k_d, or sum_d (q_d - k_d)^2.
AFFKD_DEVICE double sum_features(const FeatureView& queries, int64_t query, const FeatureView& keys,
                                 int64_t key, bool distance, double* scratch) {
  double sum = 0;
  for (int64_t d = threadIdx.x; d < queries.dim; d += kThreads) {
    const double a =
        read_number<double>(queries.data, queries.storage, query + d * queries.feature);
    const double b = read_number<double>(keys.data, keys.storage, key + d * keys.feature);
    sum += distance ? (a - b) * (a - b) : a * b;
  }
  __syncthreads();
  return block_sum(sum, scratch);
}

// What is held of pair (i, j), by all threads of a block.
AFFKD_DEVICE double exact_pair(const Params& p, bool student, int64_t n, int64_t i, int64_t j,
                               double* scratch) {
  const FeatureView& queries = student ? p.student : p.teacher;
  const FeatureView& keys = student ? p.student_keys : p.teacher_keys;
  const int64_t query = n * queries.matrix + i * queries.item;
  const int64_t key = n * keys.matrix + j * keys.item;
  const bool distance = is_distance(p.settings.pair), unit = p.settings.unit;
  double product = 0, query_length = 0, key_length = 0;
  // one after the other, so that there is one copy of the code
#pragma unroll 1
  for (int round = 0; round < (unit ? 3 : 1); ++round) {
    const bool of_query = round == 1, of_key = round == 2;
    const double sum =
        sum_features(of_key ? keys : queries, of_key ? key : query, of_query ? queries : keys,
                     of_query ? query : key, distance && !unit, scratch);
    product = round == 0 ? sum : product;
    query_length = of_query ? square_root(sum) : query_length;
    key_length = of_key ? square_root(sum) : key_length;
  }
  if (!unit) {
    return product;
  }
  const double eps = p.settings.affinity_eps;
  const double query_norm = query_length > eps ? 1 : 0, key_norm = key_length > eps ? 1 : 0;
  const bool nothing = query_norm * key_norm == 0, own = p.self && is_own(p, i, j);
  const double cosine = nothing ? 0 : own ? 1 : product / (query_length * key_length);
  return distance ? squared_distance(cosine, query_norm, key_norm) : cosine;
}

// The maximum that `state` is of.
template <typename T>
AFFKD_DEVICE double exact_maximum(const Params& p, bool student, int64_t n, const State& state,
                                  double* scratch) {
  const bool finite = state.first - state.first == 0;
  if (sizeof(T) == sizeof(double) || !finite) {
    return state.first;
  }
  const int64_t i = state.place / p.keys, j = state.place % p.keys;
  const double held = exact_pair(p, student, n, i, j, scratch);
  return PairStage<double>(p).affinity(held, scale_of<T>(p, student), is_own(p, i, j));
}

}  // namespace affkd::cuda
