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
// at once. So a simdgroup holds ROWS rows of S or dS or of their transposes, and all roles
// share this one loop, in which the tokens of `left` are columns:
//
//   role             state  left  read by  written by  result, transposed
//   OUTPUTS          S^T    v     qb       ke          o  = qb S  + scores v
//   VALUE_GRADIENTS  dS^T   do    ke       qb          dv = ke dS + scores^T do
//   QUERY_GRADIENTS  S      ke    do       v           S do   (for dq, chunk_gradients.h)
//   KEY_GRADIENTS    dS     qb    v        do          dS v   (for dk)
//   STATES           S^T    v     -        ke          -
//   STATE_GRADIENTS  dS^T   do    -        qb          -
//
// For the gradients of the gates, QUERY_GRADIENTS leaves S at the end of each segment of
// SEGMENT chunks and KEY_GRADIENTS multiplies it with dS there, elementwise, summed over
// values. No other state is ever in device memory.
//
// A sequence too long for its few heads to fill the GPU is cut into parts of whole
// segments that are scanned at once. STATES and STATE_GRADIENTS tell what each part makes
// of a state of zeros, join_parts what state each therefore starts from.

enum Role {
  OUTPUTS,
  VALUE_GRADIENTS,
  QUERY_GRADIENTS,
  KEY_GRADIENTS,
  STATES,
  STATE_GRADIENTS,
};

// Where the operands of a chunk are in threadgroup memory, in words of 16 bytes.
template <typename T, int ROLE, int R, int N, int CHUNK, int ROWS, int SIMDGROUPS>
struct ScanLayout {
  static constant constexpr int WORD = 16 / sizeof(T); // elements
  static constant constexpr bool REVERSED =
      ROLE == VALUE_GRADIENTS || ROLE == KEY_GRADIENTS || ROLE == STATE_GRADIENTS;
  static constant constexpr bool OF_KEYS = ROLE == QUERY_GRADIENTS || ROLE == KEY_GRADIENTS;
  static constant constexpr bool IS_READ = ROLE != STATES && ROLE != STATE_GRADIENTS;
  static constant constexpr bool HAS_SCORES = ROLE == OUTPUTS || ROLE == VALUE_GRADIENTS;
  static constant constexpr int LEFT_WIDTH = ROWS * SIMDGROUPS / WORD;
  static constant constexpr int RIGHT_WIDTH = N / WORD;
  static constant constexpr int SCORES_WIDTH = CHUNK / WORD;
  static constant constexpr int DECAY_WIDTH = (OF_KEYS ? ROWS * SIMDGROUPS : N) / 4;

  static constant constexpr int WRITTEN_BY = CHUNK * (LEFT_WIDTH + 1);
  static constant constexpr int DECAY = WRITTEN_BY + CHUNK * (RIGHT_WIDTH + 1);
  static constant constexpr int READ_BY = DECAY + DECAY_WIDTH;
  static constant constexpr int SCORES = READ_BY + (IS_READ ? CHUNK * (RIGHT_WIDTH + 1) : 0);
  static constant constexpr int WORDS = SCORES + (HAS_SCORES ? CHUNK * (SCORES_WIDTH + 1) : 0);
};

// The operands of a chunk on their way to threadgroup memory.
template <
    typename T,
    int ROLE,
    int R,
    int N,
    int H,
    int CHUNK,
    int ROWS,
    int SIMDGROUPS,
    int BUFFERS>
struct ScanOperands {
  typedef ScanLayout<T, ROLE, R, N, CHUNK, ROWS, SIMDGROUPS> Layout;
  static constant constexpr int THREADS = 32 * SIMDGROUPS;
  Courier<CHUNK, Layout::LEFT_WIDTH, Layout::LEFT_WIDTH + 1, THREADS, BUFFERS> left;
  Courier<CHUNK, Layout::RIGHT_WIDTH, Layout::RIGHT_WIDTH + 1, THREADS, BUFFERS> read_by;
  Courier<CHUNK, Layout::RIGHT_WIDTH, Layout::RIGHT_WIDTH + 1, THREADS, BUFFERS> written_by;
  Courier<1, Layout::DECAY_WIDTH, Layout::DECAY_WIDTH, THREADS, BUFFERS> decay;
  Courier<CHUNK, Layout::SCORES_WIDTH, Layout::SCORES_WIDTH + 1, THREADS, BUFFERS> scores;

  inline void fetch(
      const device T* left_rows,
      const device T* read_by_rows,
      const device T* written_by_rows,
      const device float* decay_row,
      const device T* scores_rows,
      uint present,
      threadgroup uint4* target,
      uint index) {
    left.fetch(left_rows, H * R / Layout::WORD, present, target, index);
    written_by.fetch(
        written_by_rows, H * N / Layout::WORD, present, target + Layout::WRITTEN_BY, index);
    decay.fetch(decay_row, 0, 1, target + Layout::DECAY, index);
    if (Layout::IS_READ) {
      read_by.fetch(
          read_by_rows, H * N / Layout::WORD, present, target + Layout::READ_BY, index);
    }
    if (Layout::HAS_SCORES) {
      scores.fetch(scores_rows, Layout::SCORES_WIDTH, CHUNK, target + Layout::SCORES, index);
    }
  }

  inline void put(threadgroup uint4* target, uint index) const {
    left.put(target, index);
    written_by.put(target + Layout::WRITTEN_BY, index);
    decay.put(target + Layout::DECAY, index);
    if (Layout::IS_READ) {
      read_by.put(target + Layout::READ_BY, index);
    }
    if (Layout::HAS_SCORES) {
      scores.put(target + Layout::SCORES, index);
    }
  }
};

template <
    typename T,
    typename Result,
    typename End,
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
    const device T* read_by, // [B, length, H, N], where IS_READ
    const device T* written_by, // [B, length, H, N]
    const device float* decay, // [B, H, chunks, keys]
    const device T* scores, // [B, H, chunks, CHUNK, CHUNK], where HAS_SCORES
    const device float* state_in, // [B, H, parts, values, keys], where IS_READ
    uint length,
    uint parts,
    device Result* results, // [B, length, H, R], where IS_READ
    device float* state_out, // [B, H, parts, values, keys], unless OF_KEYS
    device float* part_decay, // [B, H, parts, keys], unless IS_READ
    const device T* segment_states, // what QUERY_GRADIENTS leaves, KEY_GRADIENTS only
    device End* segment_ends, // [B, H, segments, keys, values] S, QUERY_GRADIENTS,
                              // or [B, H, segments, keys] <S, dS>, KEY_GRADIENTS
    threadgroup uint4* pool, // BUFFERS times Layout::WORDS
    uint lane,
    uint simdgroup,
    uint row_group, // which ROWS * SIMDGROUPS rows
    uint batch_head_part) // (batch * H + head) * parts + part
{
  typedef ScanLayout<T, ROLE, R, N, CHUNK, ROWS, SIMDGROUPS> Layout;
  constexpr int KEYS = Layout::OF_KEYS ? R : N;
  constexpr int LEFT_PITCH = (Layout::LEFT_WIDTH + 1) * Layout::WORD;
  constexpr int RIGHT_PITCH = (Layout::RIGHT_WIDTH + 1) * Layout::WORD;
  constexpr int SCORES_PITCH = (Layout::SCORES_WIDTH + 1) * Layout::WORD;

  const uint batch_head = batch_head_part / parts;
  const uint chunks = (length + CHUNK - 1) / CHUNK;
  const uint segments = (chunks + SEGMENT - 1) / SEGMENT;
  const uint part_chunks = (segments + parts - 1) / parts * SEGMENT;
  const uint first_chunk = min(batch_head_part % parts * part_chunks, chunks);
  const int steps = min(first_chunk + part_chunks, chunks) - first_chunk;

  const uint index = simdgroup * 32 + lane;
  const uint group_row = row_group * ROWS * SIMDGROUPS;
  const uint row = group_row + simdgroup * ROWS;
  const uint first_token = batch_head / H * length * H + batch_head % H;
  left += first_token * R + group_row;
  written_by += first_token * N;
  decay += batch_head * chunks * KEYS + (Layout::OF_KEYS ? group_row : 0);

  // Rows of the state are values or keys; in memory keys are next to each other.
  constexpr uint ROW_STRIDE = Layout::OF_KEYS ? 1 : N;
  constexpr uint COLUMN_STRIDE = Layout::OF_KEYS ? R : 1;
  const uint state_at = batch_head_part * R * N + row * ROW_STRIDE;
  Tile<ROWS, N> state;
  Tile<8, N> total_decay; // of the part, in every row
  if (Layout::IS_READ) {
    load(state, state_in + state_at, ROW_STRIDE, COLUMN_STRIDE, lane);
  } else {
    fill(state, 0.0f);
    fill(total_decay, 1.0f);
  }

  // The operands of AHEAD chunks are on their way while one is computed.
  constexpr int AHEAD = BUFFERS > 1 ? BUFFERS - 1 : 1;
  ScanOperands<T, ROLE, R, N, H, CHUNK, ROWS, SIMDGROUPS, BUFFERS> operands;
  for (int step = -AHEAD; step < steps; ++step) {
    if (step >= 0) {
      wait_for_all_but<AHEAD - 1>();
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const int next = step + AHEAD;
    threadgroup uint4* target = pool + next % BUFFERS * Layout::WORDS;
    if (next < steps) {
      const uint chunk = first_chunk + (Layout::REVERSED ? steps - 1 - next : next);
      const uint first = chunk * CHUNK;
      operands.fetch(
          left + first * H * R,
          Layout::IS_READ ? read_by + (first_token + first * H) * N : read_by,
          written_by + first * H * N,
          decay + chunk * KEYS,
          Layout::HAS_SCORES ? scores + (batch_head * chunks + chunk) * CHUNK * CHUNK : scores,
          length - first,
          target,
          index);
    }

    if (step >= 0) {
      const uint chunk = first_chunk + (Layout::REVERSED ? steps - 1 - step : step);
      const uint first = chunk * CHUNK;
      const bool ends_segment = chunk % SEGMENT == SEGMENT - 1 || chunk == chunks - 1;
      const uint boundary = (batch_head * segments + chunk / SEGMENT) * R + row;
      const threadgroup uint4* words = pool + step % BUFFERS * Layout::WORDS;
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
      if (Layout::IS_READ) {
        Tile<ROWS, CHUNK> result;
        fill(result, 0.0f);
        multiply_transposed(result, state, read_by_rows, RIGHT_PITCH, lane);
        if (ROLE == OUTPUTS) {
          multiply_transposed(result, columns, scores_rows, SCORES_PITCH, lane);
        }
        if (ROLE == VALUE_GRADIENTS) {
          multiply(result, columns, scores_rows, SCORES_PITCH, lane);
        }
        device Result* target = results + (first_token + first * H) * R + row;
        store(result, target, 1, H * R, length - first, lane);
      } else {
        scale_columns(total_decay, decays, lane);
      }

      if (Layout::OF_KEYS) {
        scale_rows(state, decays + simdgroup * ROWS, lane);
      } else {
        scale_columns(state, decays, lane);
      }
      multiply(state, columns, written_by_rows, RIGHT_PITCH, lane);

      if (ROLE == QUERY_GRADIENTS && ends_segment) {
        store(state, segment_ends + boundary * N, N, 1, N, lane);
      }
    }

    if (BUFFERS == 1) {
      threadgroup_barrier(mem_flags::mem_threadgroup); // all have read the only buffer
    }
    if (next < steps) {
      operands.put(target, index);
    }
    all_sent();
  }
  if (!Layout::OF_KEYS) {
    store(state, state_out + state_at, ROW_STRIDE, COLUMN_STRIDE, N, lane);
  }
  if (!Layout::IS_READ && row == 0 && fragment_row(lane) == 0) {
    store(total_decay, part_decay + batch_head_part * N, 0, 1, N, lane);
  }
}

// The state that each part of a sequence starts from, and the one after the last: a thread
// takes one element of the state through all parts.
template <int V, int K, bool REVERSED>
inline void join_parts(
    const device float* part_states, // [B, H, parts, V, K], each from zeros
    const device float* part_decay, // [B, H, parts, K]
    const device float* state_in, // [B, H, V, K]
    uint parts,
    device float* starts, // [B, H, parts, V, K]
    uint element, // of the V * K
    uint batch_head) // batch * H + head
{
  float state = state_in[batch_head * V * K + element];
  for (uint i = 0; i < parts; ++i) {
    const uint part = batch_head * parts + (REVERSED ? parts - 1 - i : i);
    starts[part * V * K + element] = state;
    state = state * part_decay[part * K + element % K] + part_states[part * V * K + element];
  }
}
