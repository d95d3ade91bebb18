// Carries a state across the chunks of a sequence, in registers from end to end.
//
// The state and its gradient obey the same recurrence in opposite directions (chunk by
// chunk, with the entering queries qb, the leaving keys ke and the decay b_end of
// chunk_prepare.h; `do` are the gradients of the outputs o):
//
//   S  <- Diag(b_end) S  + ke^T v        first chunk first
//   dS <- Diag(b_end) dS + qb^T do       last chunk first
//
// What a chunk takes from it, before it is updated, needs all keys or all values of a row
// at once. So a simdgroup holds ROWS rows of S or dS or of their transposes, and four
// roles share this one loop, in which the tokens of `left` are columns:
//
//   role             state  left  read by  written by  result, transposed
//   OUTPUTS          S^T    v     qb       ke          o  = qb S  + scores v
//   VALUE_GRADIENTS  dS^T   do    ke       qb          dv = ke dS + scores^T do
//   QUERY_GRADIENTS  S      ke    do       v           S do   (for dq, chunk_gradients.h)
//   KEY_GRADIENTS    dS     qb    v        do          dS v   (for dk)
//
// For the gradients of the gates, QUERY_GRADIENTS leaves S at the end of each segment of
// SEGMENT chunks and KEY_GRADIENTS multiplies it with dS there, elementwise, summed over
// values. No other state is ever in device memory.

enum Role { OUTPUTS, VALUE_GRADIENTS, QUERY_GRADIENTS, KEY_GRADIENTS };

// Where the operands of a chunk are in threadgroup memory, in words of 16 bytes.
template <typename T, int ROLE, int R, int N, int CHUNK, int ROWS, int SIMDGROUPS>
struct ScanLayout {
  static constant constexpr int WORD = 16 / sizeof(T); // elements
  static constant constexpr bool OF_VALUES = ROLE == OUTPUTS || ROLE == VALUE_GRADIENTS;
  static constant constexpr int LEFT_WIDTH = ROWS * SIMDGROUPS / WORD;
  static constant constexpr int RIGHT_WIDTH = N / WORD;
  static constant constexpr int SCORES_WIDTH = CHUNK / WORD;
  static constant constexpr int DECAY_WIDTH = (OF_VALUES ? N : ROWS * SIMDGROUPS) / 4;

  static constant constexpr int READ_BY = CHUNK * (LEFT_WIDTH + 1);
  static constant constexpr int WRITTEN_BY = READ_BY + CHUNK * (RIGHT_WIDTH + 1);
  static constant constexpr int DECAY = WRITTEN_BY + CHUNK * (RIGHT_WIDTH + 1);
  static constant constexpr int SCORES = DECAY + DECAY_WIDTH;
  static constant constexpr int WORDS = SCORES + (OF_VALUES ? CHUNK * (SCORES_WIDTH + 1) : 0);
};

// The operands of a chunk on their way to threadgroup memory.
template <typename T, int ROLE, int R, int N, int H, int CHUNK, int ROWS, int SIMDGROUPS>
struct ScanOperands {
  typedef ScanLayout<T, ROLE, R, N, CHUNK, ROWS, SIMDGROUPS> Layout;
  static constant constexpr int THREADS = 32 * SIMDGROUPS;
  Courier<CHUNK, Layout::LEFT_WIDTH, Layout::LEFT_WIDTH + 1, THREADS> left;
  Courier<CHUNK, Layout::RIGHT_WIDTH, Layout::RIGHT_WIDTH + 1, THREADS> read_by;
  Courier<CHUNK, Layout::RIGHT_WIDTH, Layout::RIGHT_WIDTH + 1, THREADS> written_by;
  Courier<1, Layout::DECAY_WIDTH, Layout::DECAY_WIDTH, THREADS> decay;
  Courier<CHUNK, Layout::SCORES_WIDTH, Layout::SCORES_WIDTH + 1, THREADS> scores;

  inline void fetch(
      const device T* left_rows,
      const device T* read_by_rows,
      const device T* written_by_rows,
      const device float* decay_row,
      const device T* scores_rows,
      uint present,
      uint index) {
    left.fetch(left_rows, H * R / Layout::WORD, present, index);
    read_by.fetch(read_by_rows, H * N / Layout::WORD, present, index);
    written_by.fetch(written_by_rows, H * N / Layout::WORD, present, index);
    decay.fetch(decay_row, 0, 1, index);
    if (Layout::OF_VALUES) {
      scores.fetch(scores_rows, Layout::SCORES_WIDTH, CHUNK, index);
    }
  }

  inline void put(threadgroup uint4* target, uint index) const {
    left.put(target, index);
    read_by.put(target + Layout::READ_BY, index);
    written_by.put(target + Layout::WRITTEN_BY, index);
    decay.put(target + Layout::DECAY, index);
    if (Layout::OF_VALUES) {
      scores.put(target + Layout::SCORES, index);
    }
  }
};

template <
    typename T,
    typename Result,
    int ROLE,
    int R,
    int N,
    int H,
    int CHUNK,
    int ROWS,
    int SIMDGROUPS,
    int BUFFERS,
    int SEGMENT>
inline void scan_state(
    const device T* left, // [B, length, H, R]
    const device T* read_by, // [B, length, H, N]
    const device T* written_by, // [B, length, H, N]
    const device float* decay, // [B, H, chunks, keys]
    const device T* scores, // [B, H, chunks, CHUNK, CHUNK], of values only
    const device float* state_in, // [B, H, values, keys]
    uint length,
    device Result* results, // [B, length, H, R]
    device float* state_out, // [B, H, values, keys], of values only
    const device float* segment_states, // what QUERY_GRADIENTS leaves, KEY_GRADIENTS only
    device float* segment_ends, // [B, H, segments, keys, values] S, QUERY_GRADIENTS,
                                // or [B, H, segments, keys] <S, dS>, KEY_GRADIENTS
    threadgroup uint4* pool, // BUFFERS times Layout::WORDS
    uint lane,
    uint simdgroup,
    uint row_group, // which ROWS * SIMDGROUPS rows
    uint batch_head) // batch * H + head
{
  typedef ScanLayout<T, ROLE, R, N, CHUNK, ROWS, SIMDGROUPS> Layout;
  constexpr bool OF_VALUES = Layout::OF_VALUES;
  constexpr bool REVERSED = ROLE == VALUE_GRADIENTS || ROLE == KEY_GRADIENTS;
  constexpr int KEYS = OF_VALUES ? N : R;
  constexpr int LEFT_PITCH = (Layout::LEFT_WIDTH + 1) * Layout::WORD;
  constexpr int RIGHT_PITCH = (Layout::RIGHT_WIDTH + 1) * Layout::WORD;
  constexpr int SCORES_PITCH = (Layout::SCORES_WIDTH + 1) * Layout::WORD;

  const uint chunks = (length + CHUNK - 1) / CHUNK;
  const uint segments = (chunks + SEGMENT - 1) / SEGMENT;
  const uint index = simdgroup * 32 + lane;
  const uint group_row = row_group * ROWS * SIMDGROUPS;
  const uint row = group_row + simdgroup * ROWS;
  const uint first_token = batch_head / H * length * H + batch_head % H;
  left += first_token * R + group_row;
  read_by += first_token * N;
  written_by += first_token * N;
  results += first_token * R + row;
  decay += batch_head * chunks * KEYS + (OF_VALUES ? 0 : group_row);

  // Rows of the state are values or keys; in memory keys are next to each other.
  constexpr uint ROW_STRIDE = OF_VALUES ? N : 1;
  constexpr uint COLUMN_STRIDE = OF_VALUES ? 1 : R;
  const uint state_at = batch_head * R * N + row * ROW_STRIDE;
  Tile<ROWS, N> state;
  load(state, state_in + state_at, ROW_STRIDE, COLUMN_STRIDE, lane);

  ScanOperands<T, ROLE, R, N, H, CHUNK, ROWS, SIMDGROUPS> operands;
  for (uint step = 0; step <= chunks; ++step) {
    // The operands of a step arrive while the step before it is computed.
    if (step < chunks) {
      const uint chunk = REVERSED ? chunks - 1 - step : step;
      const uint first = chunk * CHUNK;
      operands.fetch(
          left + first * H * R,
          read_by + first * H * N,
          written_by + first * H * N,
          decay + chunk * KEYS,
          OF_VALUES ? scores + (batch_head * chunks + chunk) * CHUNK * CHUNK : scores,
          length - first,
          index);
    }
    if (step > 0) {
      const uint chunk = REVERSED ? chunks - step : step - 1;
      const uint first = chunk * CHUNK;
      const bool ends_segment = chunk % SEGMENT == SEGMENT - 1 || chunk == chunks - 1;
      const uint boundary = (batch_head * segments + chunk / SEGMENT) * R + row;
      const threadgroup uint4* words = pool + (step - 1) % BUFFERS * Layout::WORDS;
      const threadgroup T* left_rows = reinterpret_cast<const threadgroup T*>(words);
      const threadgroup T* read_by_rows =
          reinterpret_cast<const threadgroup T*>(words + Layout::READ_BY);
      const threadgroup T* written_by_rows =
          reinterpret_cast<const threadgroup T*>(words + Layout::WRITTEN_BY);
      const threadgroup float* decays =
          reinterpret_cast<const threadgroup float*>(words + Layout::DECAY);
      const threadgroup T* scores_rows =
          reinterpret_cast<const threadgroup T*>(words + Layout::SCORES);

      if (ROLE == KEY_GRADIENTS && ends_segment) {
        row_products(state, segment_states + boundary * N, N, segment_ends + boundary, lane);
      }

      Tile<ROWS, CHUNK> columns;
      load(columns, left_rows + simdgroup * ROWS, 1, LEFT_PITCH, lane);
      Tile<ROWS, CHUNK> result;
      clear(result);
      multiply_transposed(result, state, read_by_rows, RIGHT_PITCH, lane);
      if (ROLE == OUTPUTS) {
        multiply_transposed(result, columns, scores_rows, SCORES_PITCH, lane);
      }
      if (ROLE == VALUE_GRADIENTS) {
        multiply(result, columns, scores_rows, SCORES_PITCH, lane);
      }
      store(result, results + first * H * R, 1, H * R, length - first, lane);

      if (OF_VALUES) {
        scale_columns(state, decays, lane);
      } else {
        scale_rows(state, decays + simdgroup * ROWS, lane);
      }
      multiply(state, columns, written_by_rows, RIGHT_PITCH, lane);

      if (ROLE == QUERY_GRADIENTS && ends_segment) {
        store(state, segment_ends + boundary * N, N, 1, N, lane);
      }
    }
    if (BUFFERS == 1) {
      threadgroup_barrier(mem_flags::mem_threadgroup); // all have read the step before
    }
    if (step < chunks) {
      operands.put(pool + step % BUFFERS * Layout::WORDS, index);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (OF_VALUES) {
    store(state, state_out + state_at, ROW_STRIDE, COLUMN_STRIDE, N, lane);
  }
}
