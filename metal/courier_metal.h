// Carries rows from device to threadgroup memory, 16 bytes at a time, in two steps: `fetch`
// starts the reads, into registers, and `put` writes what came. Between them the threads
// compute.
//
// The rows are of WIDTH words in device memory and every PITCH words in threadgroup memory,
// where a PITCH of WIDTH + 1 keeps lanes that read a column out of each other's banks.
// Where there is one buffer, all have read it before `put`.

template <int ROWS, int WIDTH, int PITCH, int THREADS, int BUFFERS>
struct Courier {
  static constant constexpr int WORDS = (ROWS * WIDTH + THREADS - 1) / THREADS;
  uint4 held[WORDS];

  // `stride` is in words; rows from `present` on become zeros.
  template <typename T>
  inline void fetch(
      const device T* source, uint stride, uint present, threadgroup uint4*, uint index) {
    const device uint4* words = reinterpret_cast<const device uint4*>(source);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const uint at = index + i * THREADS;
      const uint row = at / WIDTH;
      held[i] = row < ROWS && row < present ? words[row * stride + at % WIDTH] : uint4(0);
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
};

// Couriers that were sent together, and what waits for all but the last AHEAD of them: here
// nothing, as `put` has done it.
inline void all_sent() {}

template <int AHEAD>
inline void wait_for_all_but() {}
