// Fragments on an NVIDIA GPU: tensor core products of 16 rows by 8 columns.
//
// A lane's elements of a left operand and of a result are those of two fragments, one
// below the other. Its elements of a right operand are those of the fragment's transpose,
// which is why a right operand in threadgroup memory is read through ldmatrix: with
// .trans where it lies as it is multiplied, without where it lies transposed.
//
// bfloat16 is multiplied as it is, float32 accumulated. float16 goes through TF32, which
// has its mantissa and float32's range, since a state may exceed 65504. float32 is split
// into two TF32 numbers whose three larger products are summed (about 21 bits).

inline uint fragment_row(uint lane) {
  return lane / 4;
}

inline uint fragment_column(uint lane) {
  return lane % 4 * 2;
}

template <int ROWS, int COLUMNS>
struct Tile;

inline uint shared_address(const void* pointer) {
  return static_cast<uint>(__cvta_generic_to_shared(pointer));
}

inline uint pack_bfloat16(float2 pair) {
  uint packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(pair.y), "f"(pair.x));
  return packed;
}

// Four 8x8 matrices of 16-bit numbers; lane i passes the row i % 8 of matrix i / 8.
inline uint4 load_matrices(const void* row) {
  uint4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
               : "r"(shared_address(row)));
  return m;
}

inline uint4 load_transposed_matrices(const void* row) {
  uint4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
               : "r"(shared_address(row)));
  return m;
}

inline void multiply_bfloat16(float2& top, float2& bottom, uint4 left, uint right0, uint right1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(top.x), "+f"(top.y), "+f"(bottom.x), "+f"(bottom.y)
      : "r"(left.x), "r"(left.y), "r"(left.z), "r"(left.w), "r"(right0), "r"(right1));
}

inline uint to_tf32(float x) {
  uint rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

inline void multiply_tf32(float2& top, float2& bottom, const uint* left, const uint* right) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(top.x), "+f"(top.y), "+f"(bottom.x), "+f"(bottom.y)
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// top, bottom += (16x8) (8x8). The columns of the left side meet the rows of the right in
// the order 0, 2, 4, 6, 1, 3, 5, 7: a sum does not mind, and a lane's two neighbouring
// elements are then the ones the tensor core wants from it.
template <bool EXACT>
inline void multiply_fragments(
    float2& top, float2& bottom, float2 left_top, float2 left_bottom, float2 right) {
  const float left[4] = {left_top.x, left_bottom.x, left_top.y, left_bottom.y};
  const float column[2] = {right.x, right.y};
  uint left_high[4], right_high[2];
  for (int i = 0; i < 4; ++i) {
    left_high[i] = to_tf32(left[i]);
  }
  for (int i = 0; i < 2; ++i) {
    right_high[i] = to_tf32(column[i]);
  }
  if (EXACT) {
    uint left_low[4], right_low[2];
    for (int i = 0; i < 4; ++i) {
      left_low[i] = to_tf32(left[i] - __uint_as_float(left_high[i]));
    }
    for (int i = 0; i < 2; ++i) {
      right_low[i] = to_tf32(column[i] - __uint_as_float(right_high[i]));
    }
    multiply_tf32(top, bottom, left_low, right_high);
    multiply_tf32(top, bottom, left_high, right_low);
  }
  multiply_tf32(top, bottom, left_high, right_high);
}

template <int R, int C>
inline uint4 pack_bfloat16(const Tile<R, C>& tile, int r, int c) {
  return make_uint4(
      pack_bfloat16(tile.at[2 * r][2 * c]),
      pack_bfloat16(tile.at[2 * r + 1][2 * c]),
      pack_bfloat16(tile.at[2 * r][2 * c + 1]),
      pack_bfloat16(tile.at[2 * r + 1][2 * c + 1]));
}

template <typename T>
struct Products {
  static constexpr bool EXACT = sizeof(T) == 4;

  template <int R, int C, int N>
  static inline void multiply(
      Tile<R, N>& result, const Tile<R, C>& left, const T* right, uint pitch, uint lane) {
    right += fragment_column(lane) * pitch + fragment_row(lane);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int c = 0; c < C / 8; ++c) {
        const T* at = right + 8 * c * pitch + 8 * n;
        add<R>(result, n, left, c, make_float2(float(at[0]), float(at[pitch])));
      }
    }
  }

  template <int R, int C, int N>
  static inline void multiply_transposed(
      Tile<R, C>& result, const Tile<R, N>& left, const T* right, uint pitch, uint lane) {
    right += fragment_row(lane) * pitch + fragment_column(lane);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int c = 0; c < C / 8; ++c) {
        const T* at = right + 8 * c * pitch + 8 * n;
        add<R>(result, c, left, n, make_float2(float(at[0]), float(at[1])));
      }
    }
  }

  template <int R, int A, int B>
  static inline void add(Tile<R, A>& result, int a, const Tile<R, B>& left, int b, float2 right) {
#pragma unroll
    for (int r = 0; r < R / 8; r += 2) {
      multiply_fragments<EXACT>(
          result.at[r][a], result.at[r + 1][a], left.at[r][b], left.at[r + 1][b], right);
    }
  }
};

template <>
struct Products<__nv_bfloat16> {
  template <int R, int C, int N>
  static inline void multiply(
      Tile<R, N>& result,
      const Tile<R, C>& left,
      const __nv_bfloat16* right,
      uint pitch,
      uint lane) {
    right += lane % 16 * pitch + lane / 16 * 8;
#pragma unroll
    for (int c = 0; c < C / 16; ++c) {
      uint4 m[N / 16]; // all on their way before the first is multiplied
#pragma unroll
      for (int n = 0; n < N / 16; ++n) {
        m[n] = load_transposed_matrices(right + 16 * c * pitch + 16 * n);
      }
#pragma unroll
      for (int r = 0; r < R / 16; ++r) {
        const uint4 packed = pack_bfloat16(left, r, c);
        auto& top = result.at[2 * r];
        auto& bottom = result.at[2 * r + 1];
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
          multiply_bfloat16(top[2 * n], bottom[2 * n], packed, m[n].x, m[n].y);
          multiply_bfloat16(top[2 * n + 1], bottom[2 * n + 1], packed, m[n].z, m[n].w);
        }
      }
    }
  }

  template <int R, int C, int N>
  static inline void multiply_transposed(
      Tile<R, C>& result,
      const Tile<R, N>& left,
      const __nv_bfloat16* right,
      uint pitch,
      uint lane) {
    right += (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int c = 0; c < C / 16; ++c) {
      uint4 m[N / 16]; // all on their way before the first is multiplied
#pragma unroll
      for (int n = 0; n < N / 16; ++n) {
        m[n] = load_matrices(right + 16 * c * pitch + 16 * n);
      }
#pragma unroll
      for (int r = 0; r < R / 16; ++r) {
        auto& top = result.at[2 * r];
        auto& bottom = result.at[2 * r + 1];
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
          const uint4 packed = pack_bfloat16(left, r, n);
          multiply_bfloat16(top[2 * c], bottom[2 * c], packed, m[n].x, m[n].y);
          multiply_bfloat16(top[2 * c + 1], bottom[2 * c + 1], packed, m[n].z, m[n].w);
        }
      }
    }
  }
};

// result[r, n] += sum over c of left[r, c] right[c, n]
template <typename T, int R, int C, int N>
inline void multiply(
    Tile<R, N>& result, const Tile<R, C>& left, const T* right, uint pitch, uint lane) {
  Products<T>::multiply(result, left, right, pitch, lane);
}

// result[r, c] += sum over n of left[r, n] right[c, n]
template <typename T, int R, int C, int N>
inline void multiply_transposed(
    Tile<R, C>& result, const Tile<R, N>& left, const T* right, uint pitch, uint lane) {
  Products<T>::multiply_transposed(result, left, right, pitch, lane);
}

// The sum of the lanes that hold one row of a fragment.
inline float sum_of_row(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 2);
}

// Neighbouring elements in one access.
inline float2 load_pair(const float* source) {
  return *reinterpret_cast<const float2*>(source);
}

inline float2 load_pair(const __nv_bfloat16* source) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(source));
}

inline float2 load_pair(const __half* source) {
  return __half22float2(*reinterpret_cast<const __half2*>(source));
}

inline void store_pair(float* target, float2 pair) {
  *reinterpret_cast<float2*>(target) = pair;
}

inline void store_pair(__nv_bfloat16* target, float2 pair) {
  *reinterpret_cast<__nv_bfloat162*>(target) = __float22bfloat162_rn(pair);
}

inline void store_pair(__half* target, float2 pair) {
  *reinterpret_cast<__half2*>(target) = __float22half2_rn(pair);
}
