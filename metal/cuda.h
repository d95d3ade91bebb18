// What the kernel sources need to be CUDA: address spaces, types, simdgroup functions,
// barriers and fast arithmetic. A simdgroup is a warp: 32 lanes on both.

#define device
#define constant
#define threadgroup
#define thread

using uint = unsigned int;

// MLX compiles every function for the GPU; registers last longest where none is called.
#define inline __forceinline__

// Within 2 units in the last place of the result for x near 0, 2 + |x| elsewhere. What
// CUDA does by default is exact to one and takes a branch and twenty instructions.
inline float exponential(float x) {
  return __expf(x);
}

inline float reciprocal(float x) {
  return __fdividef(1.0f, x);
}

// A number that a template argument brings, which may be an integer only.
inline float float_of_bits(int bits) {
  return __int_as_float(bits);
}

inline float simd_shuffle_xor(float x, uint mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

inline float simd_sum(float x) {
  for (uint distance = 16; distance > 0; distance /= 2) {
    x += simd_shuffle_xor(x, distance);
  }
  return x;
}

// A barrier of CUDA orders all memory, whatever a source asks of it.
enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void simdgroup_barrier(mem_flags) {
  __syncwarp();
}

inline void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
