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
