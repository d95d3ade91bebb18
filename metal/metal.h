// What the kernel sources need beyond Metal itself.

inline float exponential(float x) {
  return exp(x);
}

// A number that a template argument brings, which may be an integer only.
inline float float_of_bits(int bits) {
  return as_type<float>(bits);
}

inline float reciprocal(float x) {
  return 1.0f / x;
}
