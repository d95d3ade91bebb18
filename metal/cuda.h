// What the kernel sources need to be CUDA: address spaces, types and simdgroup functions.
// A simdgroup is a warp: 32 lanes on both.

#define device
#define constant
#define threadgroup

using uint = unsigned int;

__device__ inline float simd_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

// The sources say `inline`; CUDA wants to hear where.
#define inline __device__ __forceinline__
