// Decoding: a few tokens of the gated recurrence, the state in registers.
//
//   S_t = Diag(f_t) S_{t-1} + k_t (x) v_t,    o_t = scale silu(q_t) S_t
//
// A simdgroup holds ROWS rows of the state [V, K]; a lane holds every 32nd column of each,
// so that neighbouring lanes read and write neighbours, and q_t S_t is one simd_sum per
// row. The state crosses device memory once in each direction whatever the number of
// tokens.

template <typename T, int K, int V, int H, int TOKENS, int ROWS>
inline void decode(
    const device T* q, // [B, TOKENS, H, K] logits
    const device T* f, // [B, TOKENS, H, K] logits; +inf leaves the state as it is
    const device T* v, // [B, TOKENS, H, V]
    const device float* lower_bound, // [H, K]
    const device float* state_in, // [B, H, V, K]
    float scale,
    device T* out, // [B, TOKENS, H, V]
    device float* state_out, // [B, H, V, K]
    uint lane,
    uint row_group, // which ROWS rows of V
    uint batch_head) // batch * H + head
{
  constexpr int COLUMNS = K / 32;
  const uint head = batch_head % H;
  const uint row = row_group * ROWS;
  const uint state_offset = (batch_head * V + row) * K + lane;

  float state[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLUMNS; ++c) {
      state[r][c] = state_in[state_offset + r * K + 32 * c];
    }
  }

  for (int t = 0; t < TOKENS; ++t) {
    const uint token_head = (batch_head / H * TOKENS + t) * H + head;
    float query[COLUMNS];
    Gates gate[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      const uint column = lane + 32 * c;
      const uint at = token_head * K + column;
      query[c] = scale * silu(float(q[at]));
      gate[c] = gates(float(f[at]), lower_bound[head * K + column]);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float value = float(v[token_head * V + row + r]);
      float partial = 0.0f;
      for (int c = 0; c < COLUMNS; ++c) {
        state[r][c] = state[r][c] * gate[c].forget + gate[c].key * value;
        partial += state[r][c] * query[c];
      }
      const float output = simd_sum(partial);
      if (lane == 0) {
        out[token_head * V + row + r] = T(output);
      }
    }
  }

  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLUMNS; ++c) {
      state_out[state_offset + r * K + 32 * c] = state[r][c];
    }
  }
}
