// What a kernel asks of the machine that runs it. The scheduler (runner.cpp) answers.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Collectives hand values between lanes without ordering memory, so ThreadSanitizer
// must not see that traffic: it would call it a race, or take it for a barrier.
#define HOST_UNSANITIZED __attribute__((no_sanitize("thread"), noinline))

namespace host {

struct Index3 {
  unsigned x, y, z;
};

// Where a thread is, under Metal's names for its attributes.
struct Thread {
  Index3 thread_position_in_grid;
  Index3 thread_position_in_threadgroup;
  Index3 threadgroup_position_in_grid;
  Index3 threads_per_grid;
  Index3 threads_per_threadgroup;
  Index3 dispatch_threads_per_threadgroup;
  Index3 threadgroups_per_grid;
  unsigned thread_index_in_threadgroup;
  unsigned thread_index_in_simdgroup;
  unsigned simdgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup;
  unsigned threads_per_simdgroup;
};

constexpr unsigned SIMDGROUP_THREADS = 32;
constexpr size_t SLOT_BYTES = 64;
constexpr unsigned MAX_THREADGROUP_VARIABLES = 64;

enum class Scope { Simdgroup, Threadgroup, End };

// Where a thread waits for the others of the scope: all of them must come to the same place.
struct Meeting {
  Scope scope;
  const char* operation;
  int line;
};

// Stops the run: the kernel did what Metal leaves undefined.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void barrier(Meeting meeting, bool orders_memory);

// A lane's place to leave a value in, and after the meeting, the places of all lanes.
void* own_slot();
const unsigned char* meet(Meeting meeting);

unsigned lane();
unsigned lanes(); // fewer than 32 at the edge of a grid

// Storage shared by the threads of a threadgroup, full of NaN at first, for the index-th
// threadgroup variable that the kernel declares.
void* threadgroup_memory(unsigned index, size_t bytes);

template <unsigned INDEX, typename T>
T& threadgroup_variable() {
  static_assert(INDEX < MAX_THREADGROUP_VARIABLES, "too many threadgroup variables");
  return *static_cast<T*>(threadgroup_memory(INDEX, sizeof(T)));
}

void count_matrix_product();

// Calls the kernel for one thread. Generated beside the kernel.
void launch(void* const* buffers, const Thread& thread);

template <typename T>
HOST_UNSANITIZED void leave(void* slot, const T& value) {
  static_assert(sizeof(T) <= SLOT_BYTES, "too large to exchange between lanes");
  __builtin_memcpy(slot, &value, sizeof(T));
}

// The values that the lanes of a simdgroup brought to a meeting.
template <typename T>
class Lanes {
 public:
  Lanes(const char* operation, int line, const T& value) {
    leave(own_slot(), value);
    slots = meet({Scope::Simdgroup, operation, line});
  }

  HOST_UNSANITIZED T operator[](unsigned lane) const {
    if (lane >= lanes()) {
      fail("lane %u reads lane %u of a simdgroup of %u threads", host::lane(), lane, lanes());
    }
    T value;
    __builtin_memcpy(&value, slots + lane * SLOT_BYTES, sizeof(T));
    return value;
  }

 private:
  const unsigned char* slots;
};

} // namespace host
