// Gates of HGRN2 from the projections' logits, in float32 (arXiv 2404.07904, section 3.2).
//
//   forget gate = lb + (1 - lb) sigmoid(f) = sigmoid(f) + lb sigmoid(-f)
//   key         = 1 - forget gate = (1 - lb) sigmoid(-f)
//
// Neither is computed from the other, so both keep their digits wherever the gate
// stands. At f = +inf, which stands for a masked token, the gate is exactly 1 and
// the key exactly 0.

inline float sigmoid(float x) {
  return 1.0f / (1.0f + exp(-x));
}

inline float silu(float x) {
  return x / (1.0f + exp(-x));
}

inline float silu_derivative(float x) {
  return sigmoid(x) * (1.0f + x * sigmoid(-x));
}

struct Gates {
  float forget;
  float key;
};

inline Gates gates(float f, float lower_bound) {
  const float closed = sigmoid(-f);
  Gates g;
  g.forget = sigmoid(f) + lower_bound * closed;
  g.key = (1.0f - lower_bound) * closed;
  return g;
}

struct GateGradients {
  float logit;
  float bound;
};

// From the gradients of the gate's logarithm and of the key to those of the logit x and
// of the lower bound:
//
//   df/dx = sigmoid(x) k,   dk/dx = -sigmoid(x) k,   df/dlb = sigmoid(-x) = -dk/dlb
//
// The logarithm's gradient is a sum with rounding errors of its own, and holds nothing of
// a gate below SMALLEST_GATE: such a gate counts as if it were that large. In the logit
// that changes nothing, as k sigmoid(x) / f is at most 1; it matters for the gradient of a
// lower bound near 0 only.
constexpr constant float SMALLEST_GATE = 1e-6f;

inline GateGradients gate_gradients(
    float x, float lower_bound, Gates gate, float log_gate_gradient, float key_gradient) {
  const float opened = sigmoid(x);
  const float gate_gradient = log_gate_gradient / max(gate.forget, SMALLEST_GATE);
  GateGradients gradients;
  gradients.logit = gate.key * opened * (gate_gradient - key_gradient);
  gradients.bound = sigmoid(-x) * (gate_gradient - key_gradient);
  return gradients;
}
