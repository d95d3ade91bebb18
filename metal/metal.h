// What the kernel sources need beyond Metal itself.

inline float exponential(float x) {
  return exp(x);
}

inline float reciprocal(float x) {
  return 1.0f / x;
}
