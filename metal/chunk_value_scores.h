// The products of every output gradient of a chunk with every value of it: the gradients of
// its scores. A simdgroup takes a chunk.
//
//   dA[t, s] = do_t . v_s

template <typename T, int V, int H, int CHUNK>
inline void value_scores(
    const device T* output_gradient, // [B, length, H, V]
    const device T* v, // [B, length, H, V]
    uint length,
    device float* scores, // [B, H, chunks, CHUNK, CHUNK]
    threadgroup uint4* pool, // 2 CHUNK rows of V elements and a word of padding
    uint lane,
    uint chunk,
    uint batch_head) // batch * H + head
{
  constexpr int WORD = 16 / sizeof(T);
  constexpr int WIDTH = V / WORD;
  constexpr int PITCH = WIDTH + 1;
  const uint chunks = (length + CHUNK - 1) / CHUNK;
  const uint first = chunk * CHUNK;
  const uint origin = ((batch_head / H * length + first) * H + batch_head % H) * V;
  Courier<CHUNK, WIDTH, PITCH, 32, 1> left_rows, right_rows;
  threadgroup uint4* right_pool = pool + CHUNK * PITCH;
  left_rows.fetch(output_gradient + origin, H * WIDTH, length - first, pool, lane);
  right_rows.fetch(v + origin, H * WIDTH, length - first, right_pool, lane);
  left_rows.put(pool, lane);
  right_rows.put(right_pool, lane);
  all_sent();
  wait_for_all_but<0>();
  simdgroup_barrier(mem_flags::mem_threadgroup);

  const threadgroup T* rows = reinterpret_cast<const threadgroup T*>(pool);
  Tile<CHUNK, V> left;
  load(left, rows, PITCH * WORD, 1, lane);
  Tile<CHUNK, CHUNK> result;
  fill(result, 0.0f);
  multiply_transposed(
      result, left, reinterpret_cast<const threadgroup T*>(right_pool), PITCH * WORD, lane);
  store(result, scores + (batch_head * chunks + chunk) * CHUNK * CHUNK, CHUNK, 1, CHUNK, lane);
}
