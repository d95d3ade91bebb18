// What the kernels within a chunk share: a lane owns two neighbouring channels of every
// token of its chunk, so that products along the tokens stay in the lane.

// Query, forget gate and key of one token and two channels.
struct Token {
  float2 query;
  Gates gates[2];
};

// A token that is not `present`, beyond the end of the sequence or of the channels, leaves
// the state as it is: its gate is 1, its key and its query 0.
template <typename T>
inline Token load_token(
    const device T* q, const device T* f, float2 lower_bound, float scale, bool present) {
  Token token;
  token.query.x = token.query.y = 0.0f;
  token.gates[0].forget = token.gates[1].forget = 1.0f;
  token.gates[0].key = token.gates[1].key = 0.0f;
  if (present) {
    const float2 query_logits = load_pair(q);
    const float2 gate_logits = load_pair(f);
    token.query.x = scale * silu(query_logits.x);
    token.query.y = scale * silu(query_logits.y);
    token.gates[0] = gates(gate_logits.x, lower_bound.x);
    token.gates[1] = gates(gate_logits.y, lower_bound.y);
  }
  return token;
}

// Sums over the simdgroup of COUNT values each, COUNT at most 32: lane i gets the sum of
// value i % COUNT. Each exchange halves the values that a lane still sums.
template <int COUNT>
inline float simd_sums(thread float* values, uint lane) {
#pragma unroll
  for (int distance = COUNT / 2; distance > 0; distance /= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < distance; ++i) {
      const float kept = upper ? values[i + distance] : values[i];
      const float sent = upper ? values[i] : values[i + distance];
      values[i] = kept + simd_shuffle_xor(sent, distance);
    }
  }
  float sum = values[0];
#pragma unroll
  for (int distance = COUNT; distance < 32; distance *= 2) {
    sum += simd_shuffle_xor(sum, distance);
  }
  return sum;
}
