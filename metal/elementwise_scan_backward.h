// The gradient of elementwise_scan.h: the same recurrence backwards in time.
//
//   dh_t = dout_t + after_t,    after_{t-1} = forget_t dh_t
//
// where after_t is the gradient of h_t through later tokens; after the last token it is
// the gradient of the final state, before the first that of the initial one. The states
// are computed again from those that tiles start from, which the forward pass kept.

template <typename T, int RUN, int SIMDGROUPS>
inline void elementwise_scan_backward(
    const device T* x, // [B, length, dim]
    const device T* f, // [B, length, dim]
    const device float* lower_bound, // [dim]
    const device float* tile_states, // [B, tiles, dim]
    const device T* out_grad, // [B, length, dim]
    const device float* state_out_grad, // [B, dim]
    uint length,
    uint dim,
    device T* x_grad, // [B, length, dim]
    device T* f_grad, // [B, length, dim]
    device float* lower_bound_grad, // [B, SIMDGROUPS, dim], to be summed over the first two
    device float* state_in_grad, // [B, dim]
    threadgroup float* decays, // [2, SIMDGROUPS, 32]
    threadgroup float* writes, // [2, SIMDGROUPS, 32]
    threadgroup float* grads, // [2, SIMDGROUPS, 32]
    uint lane,
    uint simdgroup,
    uint channel_group, // which 32 channels
    uint batch)
{
  const uint tiles = (length + RUN * SIMDGROUPS - 1) / (RUN * SIMDGROUPS);
  const bool stores = channel_group * 32 + lane < dim;
  const uint channel = min(channel_group * 32 + lane, dim - 1);
  const float bound = lower_bound[channel];
  const size_t row = size_t(batch) * length * dim + channel; // of token 0

  float bound_grad = 0.0f;
  float after_tile = state_out_grad[batch * dim + channel];
  for (uint tile = tiles; tile-- > 0;) {
    const uint start = (tile * SIMDGROUPS + simdgroup) * RUN;
    float input[RUN];
    float logit[RUN];
    float output_grad[RUN];
    Gates gate[RUN];
    float decay_of_run = 1.0f;
    float write_of_run = 0.0f;
    for (int i = 0; i < RUN; ++i) {
      const size_t at = row + size_t(min(start + i, length - 1)) * dim;
      const bool inside = start + i < length;
      input[i] = float(x[at]);
      logit[i] = float(f[at]);
      output_grad[i] = inside ? float(out_grad[at]) : 0.0f;
      gate[i] = gates(logit[i], bound);
      gate[i].forget = inside ? gate[i].forget : 1.0f;
      gate[i].key = inside ? gate[i].key : 0.0f;
      decay_of_run *= gate[i].forget;
      write_of_run = gate[i].forget * write_of_run + gate[i].key * silu(input[i]);
    }
    float grad_of_run = 0.0f;
    for (int i = RUN; i-- > 0;) {
      grad_of_run = gate[i].forget * (output_grad[i] + grad_of_run);
    }

    const uint slots = tile % 2 * SIMDGROUPS * 32 + lane; // in turn, as in the forward pass
    decays[slots + simdgroup * 32] = decay_of_run;
    writes[slots + simdgroup * 32] = write_of_run;
    grads[slots + simdgroup * 32] = grad_of_run;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float h = tile_states[(batch * tiles + tile) * dim + channel];
    for (uint run = 0; run < simdgroup; ++run) {
      h = decays[slots + run * 32] * h + writes[slots + run * 32];
    }
    float after = after_tile;
    for (uint run = SIMDGROUPS; run-- > 0;) {
      if (run == simdgroup) {
        after = after_tile;
      }
      after_tile = decays[slots + run * 32] * after_tile + grads[slots + run * 32];
    }

    float before[RUN]; // the state before each token
    for (int i = 0; i < RUN; ++i) {
      before[i] = h;
      h = gate[i].forget * h + gate[i].key * silu(input[i]);
    }
    for (int i = RUN; i-- > 0;) {
      const float grad = output_grad[i] + after;
      after = gate[i].forget * grad;
      if (start + i < length) {
        // A gate that opens keeps more of the state and writes less of the input. Its
        // derivative in the logit is (1 - lb) sigmoid(f) sigmoid(-f).
        const float gate_grad = grad * (before[i] - silu(input[i]));
        const Sigmoids s = sigmoids(logit[i]);
        bound_grad += gate_grad * s.closed;
        if (stores) {
          const size_t at = row + size_t(start + i) * dim;
          x_grad[at] = T(grad * gate[i].key * silu_derivative(input[i]));
          f_grad[at] = T(gate_grad * gate[i].key * s.opened);
        }
      }
    }
  }
  if (stores) {
    lower_bound_grad[(batch * SIMDGROUPS + simdgroup) * dim + channel] = bound_grad;
    if (simdgroup == 0) {
      state_in_grad[batch * dim + channel] = after_tile;
    }
  }
}
