// What the kernel sources need to be CUDA: address spaces, types, simdgroup functions and
// barriers. A simdgroup is a warp: 32 lanes on both.

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

// A barrier of CUDA orders all memory, whatever a source asks of it.
enum class mem_flags { mem_none, mem_device, mem_threadgroup };

__device__ inline void threadgroup_barrier(mem_flags) {
  __syncthreads();
}

// The sources say `inline`; CUDA wants to hear where.
#define inline __device__ __forceinline__
