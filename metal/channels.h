// What kernels share in which a lane owns channels: those within a chunk, where products
// along the tokens so stay in the lane, and decoding.

// Query, forget gate and key of one token and one channel.
struct Token {
  float query;
  float forget;
  float key;
};

// A token that is not `present`, beyond the end of the sequence or of the channels, leaves
// the state as it is: its gate is 1, its key and its query 0.
inline Token make_token(float q, float f, float lower_bound, float scale, bool present) {
  const Gates g = gates(f, lower_bound);
  Token token;
  token.query = present ? scale * silu(q) : 0.0f;
  token.forget = present ? g.forget : 1.0f;
  token.key = present ? g.key : 0.0f;
  return token;
}

// Sums over the simdgroup of COUNT values each, COUNT at most 32: lane i gets the sum of
// value i % COUNT. Each exchange halves the values that a lane still sums.
template <int COUNT>
inline float simd_sums(thread float* values, uint lane) {
#pragma unroll
  for (int level = 1; level <= 5; ++level) {
    const int distance = COUNT >> level;
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      if (i < distance) {
        const float kept = upper ? values[i + distance] : values[i];
        const float sent = upper ? values[i] : values[i + distance];
        values[i] = kept + simd_shuffle_xor(sent, distance);
      }
    }
  }
  float sum = values[0];
#pragma unroll
  for (int level = 0; level < 5; ++level) {
    if (COUNT << level < 32) {
      sum += simd_shuffle_xor(sum, COUNT << level);
    }
  }
  return sum;
}
