// Fragments on an Apple GPU: simdgroup matrices in float32, whatever the elements' type.

#include <metal_simdgroup_matrix>
using namespace metal;

// Quads of lanes tile the 8x8 matrix.
inline uint fragment_row(uint lane) {
  return (lane & 16) / 4 + (lane / 2) % 4;
}

inline uint fragment_column(uint lane) {
  return (lane & 8) / 2 + (lane % 2) * 2;
}

inline simdgroup_matrix<float, 8, 8> as_matrix(float2 pair) {
  simdgroup_matrix<float, 8, 8> result;
  result.thread_elements()[0] = pair.x;
  result.thread_elements()[1] = pair.y;
  return result;
}

// sum + left right, all 8x8
inline float2 multiply_fragments(float2 left, float2 right, float2 sum) {
  simdgroup_matrix<float, 8, 8> result = as_matrix(sum);
  simdgroup_multiply_accumulate(result, as_matrix(left), as_matrix(right), result);
  return float2(result.thread_elements()[0], result.thread_elements()[1]);
}

template <int ROWS, int COLUMNS>
struct Tile;

// result[r, n] += sum over c of left[r, c] right[c, n]
template <typename T, int R, int C, int N>
inline void multiply(
    thread Tile<R, N>& result,
    const thread Tile<R, C>& left,
    const threadgroup T* right,
    uint pitch,
    uint lane) {
  right += fragment_row(lane) * pitch + fragment_column(lane);
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
#pragma unroll
    for (int c = 0; c < C / 8; ++c) {
      const threadgroup T* at = right + 8 * c * pitch + 8 * n;
      const float2 pair = float2(float(at[0]), float(at[1]));
#pragma unroll
      for (int r = 0; r < R / 8; ++r) {
        result.at[r][n] = multiply_fragments(left.at[r][c], pair, result.at[r][n]);
      }
    }
  }
}

// result[r, c] += sum over n of left[r, n] right[c, n]
template <typename T, int R, int C, int N>
inline void multiply_transposed(
    thread Tile<R, C>& result,
    const thread Tile<R, N>& left,
    const threadgroup T* right,
    uint pitch,
    uint lane) {
  right += fragment_column(lane) * pitch + fragment_row(lane);
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
#pragma unroll
    for (int c = 0; c < C / 8; ++c) {
      const threadgroup T* at = right + 8 * c * pitch + 8 * n;
      const float2 pair = float2(float(at[0]), float(at[pitch]));
#pragma unroll
      for (int r = 0; r < R / 8; ++r) {
        result.at[r][c] = multiply_fragments(left.at[r][n], pair, result.at[r][c]);
      }
    }
  }
}

// The sum of the lanes that hold one row of a fragment.
inline float sum_of_row(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}

// Neighbouring elements in one access.
template <typename T>
inline float2 load_pair(const device T* source) {
  return float2(float(source[0]), float(source[1]));
}

template <typename T>
inline void store_pair(device T* target, float2 pair) {
  target[0] = T(pair.x);
  target[1] = T(pair.y);
}
