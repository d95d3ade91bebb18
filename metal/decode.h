// Decoding: a few tokens of the gated recurrence, the state in registers.
//
//   S_t = Diag(f_t) S_{t-1} + k_t (x) v_t,    o_t = scale silu(q_t) S_t
//
// A simdgroup holds ROWS rows of the state [V, K], a lane the same few columns of each,
// and q_t S_t is a sum over lanes for each row. The state crosses device memory once in each
// direction whatever the number of tokens, and that is all the time there is to lose: it
// does so in pieces of up to 16 bytes, of neighbours for neighbouring lanes. While it
// comes, the threads of a threadgroup compute the gates, each those of other columns.

// Numbers that cross memory together.
template <typename T, int WIDTH>
struct alignas(WIDTH * sizeof(T)) Piece {
  T at[WIDTH];
};

// The lane's columns of a row of K numbers. Piece i of lane l is the (32 i + l)-th.
template <int K>
struct Columns {
  static constant constexpr int WIDTH = K % 128 == 0 ? 4 : K % 64 == 0 ? 2 : 1;
  static constant constexpr int PIECES = K / 32 / WIDTH;
  typedef Piece<float, WIDTH> Numbers;
  float at[PIECES * WIDTH];

  inline void load(const device float* row, uint lane) {
    take(reinterpret_cast<const device Numbers*>(row), lane);
  }

  inline void load_shared(const threadgroup float* row, uint lane) {
    take(reinterpret_cast<const threadgroup Numbers*>(row), lane);
  }

  template <typename Pieces>
  inline void take(Pieces pieces, uint lane) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const Numbers piece = pieces[32 * i + lane];
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        at[i * WIDTH + j] = piece.at[j];
      }
    }
  }

  inline void store(device float* row, uint lane) const {
    device Numbers* pieces = reinterpret_cast<device Numbers*>(row);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      Numbers piece;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        piece.at[j] = at[i * WIDTH + j];
      }
      pieces[32 * i + lane] = piece;
    }
  }
};

template <typename T, int K, int V, int H, int TOKENS, int ROWS, int SIMDGROUPS>
inline void decode(
    const device T* q, // [B, TOKENS, H, K] logits
    const device T* f, // [B, TOKENS, H, K] logits; +inf leaves the state as it is
    const device T* v, // [B, TOKENS, H, V]
    const device float* lower_bound, // [H, K]
    const device float* state_in, // [B, H, V, K]
    float scale,
    device T* out, // [B, TOKENS, H, V]
    device float* state_out, // [B, H, V, K]
    threadgroup uint4* pool, // 3 [TOKENS, K] of float32
    uint lane,
    uint simdgroup,
    uint row_group, // which ROWS SIMDGROUPS rows of V
    uint batch_head) // batch * H + head
{
  const uint batch = batch_head / H;
  const uint head = batch_head % H;
  const uint row = (row_group * SIMDGROUPS + simdgroup) * ROWS;
  const uint first_row = batch_head * V + row; // of all heads' states
  threadgroup float* queries = reinterpret_cast<threadgroup float*>(pool);
  threadgroup float* forgets = queries + TOKENS * K;
  threadgroup float* keys = forgets + TOKENS * K;

  // All is read before anything is written: what reads after a write waits for it, as the
  // two might be one place.
  Columns<K> state[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    state[r].load(state_in + (first_row + r) * K, lane);
  }
  Piece<T, ROWS> values[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const uint token_head = (batch * TOKENS + t) * H + head;
    values[t] = *reinterpret_cast<const device Piece<T, ROWS>*>(v + token_head * V + row);
  }

#pragma unroll
  for (int first = 0; first < TOKENS * K; first += 32 * SIMDGROUPS) {
    const uint at = first + simdgroup * 32 + lane; // token, column
    if (at < TOKENS * K) {
      const uint column = at % K;
      const uint from = ((batch * TOKENS + at / K) * H + head) * K + column;
      const Gates gate = gates(float(f[from]), lower_bound[head * K + column]);
      queries[at] = silu(float(q[from]));
      forgets[at] = gate.forget;
      keys[at] = gate.key;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float outputs[TOKENS][ROWS]; // the lane's share of the sums
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    Columns<K> query, forget, key;
    query.load_shared(queries + t * K, lane);
    forget.load_shared(forgets + t * K, lane);
    key.load_shared(keys + t * K, lane);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float value = float(values[t].at[r]);
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
    const uint token_head = (batch * TOKENS + t) * H + head;
    const float output = simd_sums<ROWS>(outputs[t], lane);
    if (lane < ROWS) {
      out[token_head * V + row + lane] = T(scale * output);
    }
  }
}
