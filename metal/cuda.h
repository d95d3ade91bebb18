// What the kernel sources need to be CUDA: address spaces, types, simdgroup functions,
// barriers and fast arithmetic. A simdgroup is a warp: 32 lanes on both.

#define device
#define constant
#define threadgroup
#define thread

using uint = unsigned int;

// MLX compiles every function for the GPU; registers last longest where none is called.
#define inline __forceinline__

// What the hardware computes, to 2 units in the last place for x near 0, 2 + |x| elsewhere.
// CUDA's functions take twenty instructions for the last half of a unit, its intrinsics
// four, for results and arguments below 1e-38 that become 0 here.
inline float exponential(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f)); // 2^(x log2 e)
  return result;
}

inline float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A number that a template argument brings, which may be an integer only.
inline float float_of_bits(int bits) {
  return __int_as_float(bits);
}

inline float simd_shuffle_xor(float x, uint mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// A barrier of CUDA orders all memory, whatever a source asks of it.
enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void simdgroup_barrier(mem_flags) {
  __syncwarp();
}

inline void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
