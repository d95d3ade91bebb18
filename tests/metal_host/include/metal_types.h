// half, bfloat and vectors.
#pragma once

template <typename To, typename From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type wants types of one size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

#ifdef METAL_HOST_ADDRESS_SPACES

// A class cannot be read from an address space (its methods have a generic `this`),
// builtin types can: two that Metal lacks stand in for its 16-bit ones.
typedef decltype(1.0L) half;
typedef decltype(1.0) bfloat;

namespace metal {

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

} // namespace metal

namespace host {

// Stands for float4(x, y, z, w), which builtin vectors lack.
template <typename T, int N, typename... Values>
metal::vec<T, N> make_vector(Values... values);

} // namespace host

#else

namespace host {

// Rounds the low `bits` bits away, to nearest, ties to even.
constexpr uint32_t round_off(uint32_t x, int bits) {
  return (x + (1u << (bits - 1)) - 1 + (x >> bits & 1)) >> bits;
}

struct Bfloat {
  static uint16_t from_float(float x) {
    const bool nan = x != x;
    return nan ? 0x7fc0 : round_off(as_type<uint32_t>(x), 16);
  }

  static float to_float(uint16_t x) {
    return as_type<float>(uint32_t(x) << 16);
  }
};

struct Half {
  static uint16_t from_float(float x) {
    const uint32_t bits = as_type<uint32_t>(x);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) { // NaN
      return sign | 0x7e00;
    }
    if (magnitude >= 0x47800000) { // 65536 and beyond
      return sign | 0x7c00;
    }
    if (magnitude < 0x38800000) { // Subnormal: adding 0.5 leaves multiples of 2^-24.
      const float shifted = as_type<float>(magnitude) + 0.5f;
      return sign | (as_type<uint32_t>(shifted) - as_type<uint32_t>(0.5f));
    }
    return sign | round_off(magnitude - (112u << 23), 13); // exponent bias 127 to 15
  }

  static float to_float(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16;
    const uint32_t magnitude = x & 0x7fff;
    if (magnitude >= 0x7c00) { // infinity, NaN
      return as_type<float>(sign | 0x7f800000 | magnitude << 13);
    }
    // Scaling by 2^112 moves the exponent bias, for subnormals too.
    const float value = as_type<float>(magnitude << 13) * as_type<float>((112 + 127) << 23);
    return as_type<float>(sign | as_type<uint32_t>(value));
  }
};

// A 16-bit float. Results of two of them round to 16 bits, as on the GPU; with float or an
// integer they are float. Narrowing is explicit.
template <typename Format>
struct Float16 {
  uint16_t bits;

  Float16() = default;

  template <typename Number>
  explicit Float16(Number x) : bits(Format::from_float(float(x))) {}

  operator float() const {
    return Format::to_float(bits);
  }

  friend Float16 operator+(Float16 a, Float16 b) {
    return Float16(float(a) + float(b));
  }
  friend Float16 operator-(Float16 a, Float16 b) {
    return Float16(float(a) - float(b));
  }
  friend Float16 operator*(Float16 a, Float16 b) {
    return Float16(float(a) * float(b));
  }
  friend Float16 operator/(Float16 a, Float16 b) {
    return Float16(float(a) / float(b));
  }
  friend Float16 operator-(Float16 a) {
    return Float16(-float(a));
  }
  template <typename Number>
  Float16& operator+=(Number x) {
    return *this = Float16(float(*this) + float(x));
  }
  template <typename Number>
  Float16& operator-=(Number x) {
    return *this = Float16(float(*this) - float(x));
  }
  template <typename Number>
  Float16& operator*=(Number x) {
    return *this = Float16(float(*this) * float(x));
  }
  template <typename Number>
  Float16& operator/=(Number x) {
    return *this = Float16(float(*this) / float(x));
  }
};

template <typename T, int N>
struct Components;

template <typename T>
struct Components<T, 2> {
  T x, y;
};

template <typename T>
struct Components<T, 3> {
  T x, y, z;
};

template <typename T>
struct Components<T, 4> {
  T x, y, z, w;
};

} // namespace host

typedef host::Float16<host::Half> half;
typedef host::Float16<host::Bfloat> bfloat;

namespace metal {

template <typename T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec : host::Components<T, N> {
  vec() = default;

  // Copied by components, not as a block: each is a load or a store that can be counted.
  vec(const vec& other) {
    *this = other;
  }
  vec& operator=(const vec& other) {
    for (int i = 0; i < N; ++i) {
      (*this)[i] = other[i];
    }
    return *this;
  }

  vec(T value) {
    for (int i = 0; i < N; ++i) {
      (*this)[i] = value;
    }
  }

  template <typename... Values>
  vec(T first, T second, Values... rest) {
    static_assert(sizeof...(rest) == N - 2, "a vector wants all its components");
    const T values[] = {first, second, T(rest)...};
    for (int i = 0; i < N; ++i) {
      (*this)[i] = values[i];
    }
  }

  template <typename U>
  explicit vec(const vec<U, N>& other) {
    for (int i = 0; i < N; ++i) {
      (*this)[i] = T(other[i]);
    }
  }

  T& operator[](int i) {
    return (&this->x)[i];
  }
  const T& operator[](int i) const {
    return (&this->x)[i];
  }

  friend vec operator+(vec a, const vec& b) {
    return a += b;
  }
  friend vec operator-(vec a, const vec& b) {
    return a -= b;
  }
  friend vec operator*(vec a, const vec& b) {
    return a *= b;
  }
  friend vec operator/(vec a, const vec& b) {
    return a /= b;
  }
  vec& operator+=(const vec& b) {
    for (int i = 0; i < N; ++i) {
      (*this)[i] = (*this)[i] + b[i];
    }
    return *this;
  }
  vec& operator-=(const vec& b) {
    for (int i = 0; i < N; ++i) {
      (*this)[i] = (*this)[i] - b[i];
    }
    return *this;
  }
  vec& operator*=(const vec& b) {
    for (int i = 0; i < N; ++i) {
      (*this)[i] = (*this)[i] * b[i];
    }
    return *this;
  }
  vec& operator/=(const vec& b) {
    for (int i = 0; i < N; ++i) {
      (*this)[i] = (*this)[i] / b[i];
    }
    return *this;
  }
};

} // namespace metal

#endif

#define HOST_VECTORS(type)                \
  typedef metal::vec<type, 2> type##2; \
  typedef metal::vec<type, 3> type##3; \
  typedef metal::vec<type, 4> type##4;

HOST_VECTORS(float)
HOST_VECTORS(half)
HOST_VECTORS(bfloat)
HOST_VECTORS(int)
HOST_VECTORS(uint)
HOST_VECTORS(ushort)
HOST_VECTORS(uchar)
HOST_VECTORS(ulong)
#undef HOST_VECTORS
