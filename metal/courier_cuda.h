// Carries rows from device to threadgroup memory, 16 bytes at a time, as courier_metal.h
// does. Here the copy engine writes them to `target` on its own, so that rows of several
// chunks can be on their way: `fetch` starts it. With one buffer that would write over what
// is still read, so there `fetch` takes the address and `put` starts it.

template <int ROWS, int WIDTH, int PITCH, int THREADS, int BUFFERS>
struct Courier {
  const uint4* words;
  uint stride;
  uint present;

  // `row_stride` is in words; rows from `rows_present` on become zeros.
  template <typename T>
  inline void fetch(
      const T* source, uint row_stride, uint rows_present, uint4* target, uint index) {
    words = reinterpret_cast<const uint4*>(source);
    stride = row_stride;
    present = rows_present;
    if (BUFFERS > 1) {
      copy(target, index);
    }
  }

  inline void put(uint4* target, uint index) const {
    if (BUFFERS == 1) {
      copy(target, index);
    }
  }

  inline void copy(uint4* target, uint index) const {
#pragma unroll
    for (int i = 0; i < (ROWS * WIDTH + THREADS - 1) / THREADS; ++i) {
      const uint at = index + i * THREADS;
      const uint row = at / WIDTH;
      if (row < ROWS) {
        const uint bytes = row < present ? 16 : 0;
        const uint4* from = bytes ? words + row * stride + at % WIDTH : words;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(shared_address(target + row * PITCH + at % WIDTH)),
                       "l"(from),
                       "r"(bytes)
                     : "memory");
      }
    }
  }
};

inline void all_sent() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int AHEAD>
inline void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD) : "memory");
}
