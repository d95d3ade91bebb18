// What a chunk of tokens is to the state that passes it (b and e are products of gates):
//
//   entering queries  q_t b_t,  b_t = f_1 ... f_t          read the state before the chunk
//   leaving keys      k_s e_s,  e_s = f_{s+1} ... f_end    write the state after it
//   decay             b_end                                carries the state across
//   scores[t, s]      sum over channels of q_t (f_{s+1} ... f_t) k_s,  s <= t
//
// All decays are products of gates in [0, 1], none a quotient or a difference of
// logarithms: where one underflows, 0 is right. A simdgroup takes a chunk, 64 channels at
// a time.

template <typename T, int K, int H, int CHUNK>
inline void prepare_chunk(
    const device T* q, // [B, length, H, K] logits
    const device T* f, // [B, length, H, K] logits; +inf leaves the state as it is
    const device float* lower_bound, // [H, K]
    float scale,
    uint length,
    device T* entering_queries, // [B, length, H, K]
    device T* leaving_keys, // [B, length, H, K]
    device float* decay, // [B, H, chunks, K]
    device T* scores, // [B, H, chunks, CHUNK, CHUNK]
    uint lane,
    uint chunk,
    uint batch_head) // batch * H + head
{
  const uint chunks = (length + CHUNK - 1) / CHUNK;
  const uint first = chunk * CHUNK;
  const uint head = batch_head % H;
  const uint token_stride = H * K;
  const uint origin = (batch_head / H * length + first) * token_stride + head * K;
  decay += (batch_head * chunks + chunk) * K;
  scores += (batch_head * chunks + chunk) * CHUNK * CHUNK;

  // Sums of CHUNK values are taken at once: the CHUNK - s scores of column s and the s
  // scores of column CHUNK - s fill one round. The lane holds its share of each round.
  constexpr int ROUNDS = CHUNK / 2 + 1;
  float sums[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    sums[round] = 0.0f;
  }

  for (uint slice = 0; slice < K; slice += 64) {
    const bool own = slice + 2 * lane < K;
    const uint channel = own ? slice + 2 * lane : 0;
    const float2 bound = load_pair(lower_bound + head * K + channel);

    // All reads before any use of one, and none behind a condition: they overlap.
    float2 q_logits[CHUNK], f_logits[CHUNK];
#pragma unroll
    for (int t = 0; t < CHUNK; ++t) {
      const uint at = origin + min(uint(t), length - 1 - first) * token_stride + channel;
      q_logits[t] = load_pair(q + at);
      f_logits[t] = load_pair(f + at);
    }
    Token x[CHUNK], y[CHUNK]; // of the lane's two channels
#pragma unroll
    for (int t = 0; t < CHUNK; ++t) {
      const bool present = own && first + t < length;
      x[t] = make_token(q_logits[t].x, f_logits[t].x, bound.x, scale, present);
      y[t] = make_token(q_logits[t].y, f_logits[t].y, bound.y, scale, present);
    }

#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      float score[CHUNK];
#pragma unroll
      for (int slot = 0; slot < CHUNK; ++slot) {
        score[slot] = 0.0f;
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int s = part == 0 ? round : CHUNK - round;
        if (s < CHUNK && (part == 0 || 2 * round != CHUNK)) {
          float x_key = x[s].key;
          float y_key = y[s].key;
#pragma unroll
          for (int t = 0; t < CHUNK; ++t) {
            if (t > s) {
              x_key *= x[t].forget;
              y_key *= y[t].forget;
            }
            if (t >= s) {
              score[part == 0 ? t - s : t] = x[t].query * x_key + y[t].query * y_key;
            }
          }
        }
      }
      sums[round] += simd_sums<CHUNK>(score, lane);
    }

    float2 product;
    product.x = product.y = 1.0f;
#pragma unroll
    for (int t = 0; t < CHUNK; ++t) {
      product.x *= x[t].forget;
      product.y *= y[t].forget;
      if (own && first + t < length) {
        float2 entering;
        entering.x = x[t].query * product.x;
        entering.y = y[t].query * product.y;
        store_pair(entering_queries + origin + t * token_stride + channel, entering);
      }
    }
    if (own) {
      store_pair(decay + channel, product);
    }
    product.x = product.y = 1.0f;
#pragma unroll
    for (int t = CHUNK - 1; t >= 0; --t) {
      if (own && first + t < length) {
        float2 leaving;
        leaving.x = x[t].key * product.x;
        leaving.y = y[t].key * product.y;
        store_pair(leaving_keys + origin + t * token_stride + channel, leaving);
      }
      product.x *= x[t].forget;
      product.y *= y[t].forget;
    }
  }

  // Each lane writes the sums it holds; what is above the diagonal is 0.
  const int slot = lane % CHUNK;
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const bool first_column = slot < CHUNK - round;
    const int s = first_column ? round : CHUNK - round;
    const int t = first_column ? round + slot : slot;
    if (lane < CHUNK && (first_column || 2 * round != CHUNK)) {
      scores[t * CHUNK + s] = T(sums[round]);
    }
  }
  for (int at = lane; at < CHUNK * CHUNK; at += 32) {
    if (at % CHUNK > at / CHUNK) {
      scores[at] = T(0.0f);
    }
  }
}
