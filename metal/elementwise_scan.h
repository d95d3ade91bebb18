// HGRN's recurrence over any number of tokens, a number of state per channel.
//
//   h_t = forget_t h_{t-1} + key_t silu(x_t)
//
// Neighbouring tokens act on the state as one token: they decay it by the product of
// their gates and write what they leave of a state of zeros. So the simdgroups of a
// threadgroup take a run of RUN tokens each, tell the others what their run does, and
// start it from the state that the runs before it leave. SIMDGROUPS runs are a tile;
// tiles follow one another. Lanes are neighbouring channels. All factors are products
// of gates: nothing is divided and no logarithm taken.

template <typename T, int RUN, int SIMDGROUPS>
inline void elementwise_scan(
    const device T* x, // [B, length, dim]
    const device T* f, // [B, length, dim] logits; +inf leaves the state as it is
    const device float* lower_bound, // [dim]
    const device float* state_in, // [B, dim]
    uint length,
    uint dim,
    device T* out, // [B, length, dim]
    device float* state_out, // [B, dim]
    device float* tile_states, // [B, tiles, dim], the states that the tiles start from
    threadgroup float* decays, // [2, SIMDGROUPS, 32]
    threadgroup float* writes, // [2, SIMDGROUPS, 32]
    uint lane,
    uint simdgroup,
    uint channel_group, // which 32 channels
    uint batch)
{
  const uint tiles = (length + RUN * SIMDGROUPS - 1) / (RUN * SIMDGROUPS);
  // Lanes beyond the last channel repeat it and store nothing: barriers want all lanes.
  const bool stores = channel_group * 32 + lane < dim;
  const uint channel = min(channel_group * 32 + lane, dim - 1);
  const float bound = lower_bound[channel];
  const size_t row = size_t(batch) * length * dim + channel; // of token 0

  float state = state_in[batch * dim + channel];
  for (uint tile = 0; tile < tiles; ++tile) {
    const uint start = (tile * SIMDGROUPS + simdgroup) * RUN;
    float forget[RUN];
    float write[RUN];
    float decay_of_run = 1.0f;
    float write_of_run = 0.0f;
    for (int i = 0; i < RUN; ++i) {
      // Tokens beyond the last repeat it too, and leave the state as it is.
      const size_t at = row + size_t(min(start + i, length - 1)) * dim;
      const Gates gate = gates(float(f[at]), bound);
      const float value = silu(float(x[at]));
      const bool inside = start + i < length;
      forget[i] = inside ? gate.forget : 1.0f;
      write[i] = inside ? gate.key * value : 0.0f;
      decay_of_run *= forget[i];
      write_of_run = forget[i] * write_of_run + write[i];
    }

    // Two sets of slots take turns, so one barrier a tile is enough: nobody is still
    // reading the set of two tiles ago.
    const uint slots = tile % 2 * SIMDGROUPS * 32 + lane;
    decays[slots + simdgroup * 32] = decay_of_run;
    writes[slots + simdgroup * 32] = write_of_run;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0 && stores) {
      tile_states[(batch * tiles + tile) * dim + channel] = state;
    }
    float h = state;
    for (uint run = 0; run < SIMDGROUPS; ++run) {
      if (run == simdgroup) {
        h = state;
      }
      state = decays[slots + run * 32] * state + writes[slots + run * 32];
    }

    for (int i = 0; i < RUN; ++i) {
      h = forget[i] * h + write[i];
      if (stores && start + i < length) {
        out[row + size_t(start + i) * dim] = T(h);
        if (start + i == length - 1) {
          state_out[batch * dim + channel] = h;
        }
      }
    }
  }
}
