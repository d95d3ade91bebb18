// Gates of HGRN2 from the projections' logits, in float32 (arXiv 2404.07904, section 3.2).
//
//   forget gate = lb + (1 - lb) sigmoid(f) = sigmoid(f) + lb sigmoid(-f)
//   key         = 1 - forget gate = (1 - lb) sigmoid(-f)
//
// Neither is computed from the other, so both keep their digits wherever the gate
// stands. At f = +inf, which stands for a masked token, the gate is exactly 1 and
// the key exactly 0.

// sigmoid(x) and sigmoid(-x), each as precise as the other.
struct Sigmoids {
  float opened;
  float closed;
};

inline Sigmoids sigmoids(float x) {
  const float z = exponential(-abs(x));
  const float large = reciprocal(1.0f + z);
  const float small = z * large;
  Sigmoids s;
  s.opened = x >= 0.0f ? large : small;
  s.closed = x >= 0.0f ? small : large;
  return s;
}

inline float silu(float x) {
  return x * sigmoids(x).opened;
}

inline float silu_derivative(float x) {
  const Sigmoids s = sigmoids(x);
  return s.opened * (1.0f + x * s.closed);
}

struct Gates {
  float forget;
  float key;
};

inline Gates gates(float f, float lower_bound) {
  const Sigmoids s = sigmoids(f);
  Gates g;
  g.forget = s.opened + lower_bound * s.closed;
  g.key = (1.0f - lower_bound) * s.closed;
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
    float x, float lower_bound, float log_gate_gradient, float key_gradient) {
  const Sigmoids s = sigmoids(x);
  const float forget = s.opened + lower_bound * s.closed;
  const float gate_gradient = log_gate_gradient * reciprocal(max(forget, SMALLEST_GATE));
  GateGradients gradients;
  gradients.bound = s.closed * (gate_gradient - key_gradient);
  gradients.logit = (1.0f - lower_bound) * s.opened * gradients.bound;
  return gradients;
}
