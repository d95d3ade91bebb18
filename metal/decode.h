// Decoding: a few tokens of the gated recurrence, the state in registers.
//
//   S_t = Diag(f_t) S_{t-1} + k_t (x) v_t,    o_t = scale silu(q_t) S_t
//
// A simdgroup holds ROWS rows of the state [V, K], a lane the same few columns of each,
// and q_t S_t is a sum over lanes for each row. The state crosses device memory once in each
// direction whatever the number of tokens, and that is all the time there is to lose: it
// does so in pieces of up to 16 bytes, of neighbours for neighbouring lanes.

// Numbers that cross memory together.
template <typename T, int WIDTH>
struct alignas(WIDTH * sizeof(T)) Piece {
  T at[WIDTH];
};

// The lane's columns of a row of K, in float32. Piece i of lane l is the (32 i + l)-th.
template <int K>
struct Columns {
  static constant constexpr int WIDTH = K % 128 == 0 ? 4 : K % 64 == 0 ? 2 : 1;
  static constant constexpr int PIECES = K / 32 / WIDTH;
  float at[PIECES * WIDTH];

  template <typename T>
  inline void load(const device T* row, uint lane) {
    const device Piece<T, WIDTH>* pieces = reinterpret_cast<const device Piece<T, WIDTH>*>(row);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const Piece<T, WIDTH> piece = pieces[32 * i + lane];
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        at[i * WIDTH + j] = float(piece.at[j]);
      }
    }
  }

  inline void store(device float* row, uint lane) const {
    device Piece<float, WIDTH>* pieces = reinterpret_cast<device Piece<float, WIDTH>*>(row);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      Piece<float, WIDTH> piece;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        piece.at[j] = at[i * WIDTH + j];
      }
      pieces[32 * i + lane] = piece;
    }
  }
};

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
  const uint head = batch_head % H;
  const uint row = row_group * ROWS;
  const uint first_row = batch_head * V + row; // of all heads' states

  // All is read before anything is written: what reads after a write waits for it, as the
  // two might be one place.
  Columns<K> state[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    state[r].load(state_in + (first_row + r) * K, lane);
  }
  Columns<K> bound;
  bound.load(lower_bound + head * K, lane);

  float outputs[TOKENS][ROWS]; // the lane's share of the sums
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const uint token_head = (batch_head / H * TOKENS + t) * H + head;
    const Piece<T, ROWS> values =
        *reinterpret_cast<const device Piece<T, ROWS>*>(v + token_head * V + row);
    Columns<K> query, forget, key;
    query.load(q + token_head * K, lane);
    forget.load(f + token_head * K, lane);
#pragma unroll
    for (int c = 0; c < K / 32; ++c) {
      const Gates gate = gates(forget.at[c], bound.at[c]);
      query.at[c] = silu(query.at[c]);
      forget.at[c] = gate.forget;
      key.at[c] = gate.key;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float value = float(values.at[r]);
      outputs[t][r] = 0.0f;
#pragma unroll
      for (int c = 0; c < K / 32; ++c) {
        state[r].at[c] = state[r].at[c] * forget.at[c] + key.at[c] * value;
        outputs[t][r] += state[r].at[c] * query.at[c];
      }
    }
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    state[r].store(state_out + (first_row + r) * K, lane);
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const uint token_head = (batch_head / H * TOKENS + t) * H + head;
    const float output = simd_sums<ROWS>(outputs[t], lane);
    if (lane < ROWS) {
      out[token_head * V + row + lane] = T(scale * output);
    }
  }
}
