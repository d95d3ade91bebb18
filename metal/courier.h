// Carries rows from device to threadgroup memory, 16 bytes at a time, in two steps: `fetch`
// starts the reads into registers, `put` writes what came. Between them the threads compute.
//
// The rows are of WIDTH words in device memory and every PITCH words in threadgroup memory,
// where a PITCH of WIDTH + 1 keeps lanes that read a column out of each other's banks.

template <int ROWS, int WIDTH, int PITCH, int THREADS>
struct Courier {
  static constant constexpr int WORDS = (ROWS * WIDTH + THREADS - 1) / THREADS;
  uint4 held[WORDS];

  // `stride` is in words; rows from `present` on are zeros.
  template <typename T>
  inline void fetch(const device T* source, uint stride, uint present, uint index) {
    const device uint4* words = reinterpret_cast<const device uint4*>(source);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const uint at = index + i * THREADS;
      const uint row = at / WIDTH;
      held[i] = row < ROWS && row < present ? words[row * stride + at % WIDTH] : no_word();
    }
  }

  inline void put(threadgroup uint4* target, uint index) const {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const uint at = index + i * THREADS;
      if (at < ROWS * WIDTH) {
        target[at / WIDTH * PITCH + at % WIDTH] = held[i];
      }
    }
  }

  static inline uint4 no_word() {
    uint4 word;
    word.x = word.y = word.z = word.w = 0;
    return word;
  }
};
