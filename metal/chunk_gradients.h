// Gradients within a chunk, from what the scans across chunks found.
//
// With D[t, s] = f_{s+1} ... f_t, and dA[t, s] = do_t . v_s:
//
//   dq_t = b_t (S_before do_t)  + sum over s <= t of dA[t, s] D[t, s] k_s
//   dk_s = e_s (dS_after v_s)   + sum over t >= s of dA[t, s] D[t, s] q_t
//
// A gate acts on every pair of a key before it and a query from it on. Queries and keys
// count the pairs they are in, so that for each channel, summed from the end of a segment,
//
//   d(log f_t) = <S_end, dS_end> + sum over u >= t of (q_u dq_u - k_u dk_u)
//
// From there to the logits: f = lb + (1 - lb) sigmoid(x) and k = (1 - lb) sigmoid(-x) give
// df/dx = sigmoid(x) k and dk/dx = -sigmoid(x) k.

// dA of a chunk, by a simdgroup: products of rows of output gradients with rows of values.
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
  Courier<CHUNK, WIDTH, PITCH, 32> courier;
  courier.fetch(output_gradient + origin, H * WIDTH, length - first, lane);
  courier.put(pool, lane);
  courier.fetch(v + origin, H * WIDTH, length - first, lane);
  courier.put(pool + CHUNK * PITCH, lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);

  const threadgroup T* rows = reinterpret_cast<const threadgroup T*>(pool);
  Tile<CHUNK, V> left;
  load(left, rows, PITCH * WORD, 1, lane);
  Tile<CHUNK, CHUNK> result;
  clear(result);
  multiply_transposed(result, left, rows + CHUNK * PITCH * WORD, PITCH * WORD, lane);
  store(result, scores + (batch_head * chunks + chunk) * CHUNK * CHUNK, CHUNK, 1, CHUNK, lane);
}

// A simdgroup takes a segment of SEGMENT chunks, last chunk first, and 64 channels.
template <typename T, int K, int H, int CHUNK, int SEGMENT>
inline void chunk_gradients(
    const device T* q, // [B, length, H, K] logits
    const device T* f, // [B, length, H, K] logits; +inf leaves the state as it is
    const device float* lower_bound, // [H, K]
    float scale,
    uint length,
    const device float* value_scores, // [B, H, chunks, CHUNK, CHUNK]
    const device float* state_queries, // [B, length, H, K], S_before do_t
    const device float* state_keys, // [B, length, H, K], dS_after v_s
    const device float* segment_products, // [B, H, segments, K], <S_end, dS_end>
    device T* q_gradients, // [B, length, H, K]
    device T* f_gradients, // [B, length, H, K]
    device float* bound_gradients, // [B, segments, H, K]
    uint lane,
    uint slice,
    uint segment,
    uint batch_head) // batch * H + head
{
  const uint chunks = (length + CHUNK - 1) / CHUNK;
  const uint segments = (chunks + SEGMENT - 1) / SEGMENT;
  const uint head = batch_head % H;
  const uint token_stride = H * K;
  const uint channel = slice * 64 + 2 * lane;
  if (channel >= K) {
    return;
  }
  const float2 bound = load_pair(lower_bound + head * K + channel);
  float2 log_gate_gradient =
      load_pair(segment_products + (batch_head * segments + segment) * K + channel);
  float2 bound_gradient;
  bound_gradient.x = bound_gradient.y = 0.0f;

  const uint last = min((segment + 1) * SEGMENT, chunks);
  for (uint chunk = last; chunk-- > segment * SEGMENT;) {
    const uint first = chunk * CHUNK;
    const uint origin = (batch_head / H * length + first) * token_stride + head * K + channel;
    const device float* pairs = value_scores + (batch_head * chunks + chunk) * CHUNK * CHUNK;

    Token token[CHUNK];
    float2 query_gradient[CHUNK];
    float2 key_gradient[CHUNK];
#pragma unroll
    for (int t = 0; t < CHUNK; ++t) {
      const uint at = origin + t * token_stride;
      token[t] = load_token(q + at, f + at, bound, scale, first + t < length);
      query_gradient[t].x = query_gradient[t].y = 0.0f;
      key_gradient[t].x = key_gradient[t].y = 0.0f;
    }

#pragma unroll
    for (int s = 0; s < CHUNK; ++s) {
      float2 decay;
      decay.x = decay.y = 1.0f;
#pragma unroll
      for (int t = s; t < CHUNK; ++t) {
        if (t > s) {
          decay.x *= token[t].gates[0].forget;
          decay.y *= token[t].gates[1].forget;
        }
        const float pair = pairs[t * CHUNK + s];
        const float x = pair * decay.x;
        const float y = pair * decay.y;
        query_gradient[t].x += x * token[s].gates[0].key;
        query_gradient[t].y += y * token[s].gates[1].key;
        key_gradient[s].x += x * token[t].query.x;
        key_gradient[s].y += y * token[t].query.y;
      }
    }

    float2 decay;
    decay.x = decay.y = 1.0f;
#pragma unroll
    for (int t = 0; t < CHUNK; ++t) {
      decay.x *= token[t].gates[0].forget;
      decay.y *= token[t].gates[1].forget;
      if (first + t < length) {
        const float2 from_state = load_pair(state_queries + origin + t * token_stride);
        query_gradient[t].x += decay.x * from_state.x;
        query_gradient[t].y += decay.y * from_state.y;
      }
    }

    decay.x = decay.y = 1.0f;
#pragma unroll
    for (int t = CHUNK - 1; t >= 0; --t) {
      if (first + t < length) {
        const uint at = origin + t * token_stride;
        const float2 from_state = load_pair(state_keys + at);
        const float2 query_logits = load_pair(q + at);
        const float2 gate_logits = load_pair(f + at);
        key_gradient[t].x += decay.x * from_state.x;
        key_gradient[t].y += decay.y * from_state.y;
        log_gate_gradient.x += token[t].query.x * query_gradient[t].x -
            token[t].gates[0].key * key_gradient[t].x;
        log_gate_gradient.y += token[t].query.y * query_gradient[t].y -
            token[t].gates[1].key * key_gradient[t].y;

        const GateGradients x = gate_gradients(
            gate_logits.x, bound.x, token[t].gates[0], log_gate_gradient.x, key_gradient[t].x);
        const GateGradients y = gate_gradients(
            gate_logits.y, bound.y, token[t].gates[1], log_gate_gradient.y, key_gradient[t].y);
        bound_gradient.x += x.bound;
        bound_gradient.y += y.bound;

        float2 q_gradient, f_gradient;
        q_gradient.x = scale * silu_derivative(query_logits.x) * query_gradient[t].x;
        q_gradient.y = scale * silu_derivative(query_logits.y) * query_gradient[t].y;
        f_gradient.x = x.logit;
        f_gradient.y = y.logit;
        store_pair(q_gradients + at, q_gradient);
        store_pair(f_gradients + at, f_gradient);
      }
      decay.x *= token[t].gates[0].forget;
      decay.y *= token[t].gates[1].forget;
    }
  }
  store_pair(
      bound_gradients + ((batch_head / H * segments + segment) * H + head) * K + channel,
      bound_gradient);
}
