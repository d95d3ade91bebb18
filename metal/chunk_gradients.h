// Gradients within a chunk, from what the scans across chunks found.
//
// With D[t, s] = f_{s+1} ... f_t, and dA[t, s] = do_t . v_s (chunk_value_scores.h):
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

// A simdgroup takes a segment of SEGMENT chunks, last chunk first, and 32 channels.
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
  const uint channel = slice * 32 + lane;
  if (channel >= K) {
    return;
  }
  const float bound = lower_bound[head * K + channel];
  float log_gate_gradient = segment_products[(batch_head * segments + segment) * K + channel];
  float bound_gradient = 0.0f;

  const uint last = min((segment + 1) * SEGMENT, chunks);
  for (uint chunk = last; chunk-- > segment * SEGMENT;) {
    const uint first = chunk * CHUNK;
    const uint origin = (batch_head / H * length + first) * token_stride + head * K + channel;
    const device float4* pairs = reinterpret_cast<const device float4*>(
        value_scores + (batch_head * chunks + chunk) * CHUNK * CHUNK);

    // All reads before any use of one, and none behind a condition: they overlap.
    float q_logits[CHUNK], f_logits[CHUNK], from_queries[CHUNK], from_keys[CHUNK];
#pragma unroll
    for (int t = 0; t < CHUNK; ++t) {
      const uint at = origin + min(uint(t), length - 1 - first) * token_stride;
      q_logits[t] = float(q[at]);
      f_logits[t] = float(f[at]);
      from_queries[t] = state_queries[at];
      from_keys[t] = state_keys[at];
    }
    Token token[CHUNK];
    float query_gradient[CHUNK], key_gradient[CHUNK];
    float entering = 1.0f;
#pragma unroll
    for (int t = 0; t < CHUNK; ++t) {
      token[t] = make_token(q_logits[t], f_logits[t], bound, scale, first + t < length);
      entering *= token[t].forget;
      query_gradient[t] = entering * from_queries[t];
    }
    float leaving = 1.0f;
#pragma unroll
    for (int t = CHUNK - 1; t >= 0; --t) {
      key_gradient[t] = leaving * from_keys[t];
      leaving *= token[t].forget;
    }

#pragma unroll
    for (int t = 0; t < CHUNK; ++t) {
      float row[CHUNK]; // dA[t, s]
#pragma unroll
      for (int s = 0; s < CHUNK; s += 4) {
        if (s <= t) {
          const float4 four = pairs[(t * CHUNK + s) / 4];
          row[s] = four.x;
          row[s + 1] = four.y;
          row[s + 2] = four.z;
          row[s + 3] = four.w;
        }
      }
      float decay = 1.0f; // D[t, s]
#pragma unroll
      for (int s = CHUNK - 1; s >= 0; --s) {
        if (s <= t) {
          const float pair = row[s] * decay;
          query_gradient[t] += pair * token[s].key;
          key_gradient[s] += pair * token[t].query;
          decay *= token[s].forget;
        }
      }
    }

#pragma unroll
    for (int t = CHUNK - 1; t >= 0; --t) {
      log_gate_gradient += token[t].query * query_gradient[t] - token[t].key * key_gradient[t];
      if (first + t < length) {
        const GateGradients gradients =
            gate_gradients(f_logits[t], bound, log_gate_gradient, key_gradient[t]);
        bound_gradient += gradients.bound;
        const uint at = origin + t * token_stride;
        q_gradients[at] = T(scale * silu_derivative(q_logits[t]) * query_gradient[t]);
        f_gradients[at] = T(gradients.logit);
      }
    }
  }
  bound_gradients[((batch_head / H * segments + segment) * H + head) * K + channel] =
      bound_gradient;
}
