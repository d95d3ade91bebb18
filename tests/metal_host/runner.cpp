// Runs one kernel over a grid: a job on standard input, its outputs on standard output.
//
// The threads of a threadgroup are fibers of one OS thread. A fiber runs until it meets
// others (a barrier, a simdgroup function) or ends. A simdgroup runs as far as it can
// before the next one starts, its lanes one after the other: what is missing a barrier
// then sees its neighbours far ahead or far behind, depending on the order.
//
// HOST_ASAN and HOST_TSAN say that the kernel is instrumented. This file never is.

#include "host.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(HOST_ASAN)
#include <sanitizer/common_interface_defs.h>
#elif defined(HOST_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

using host::Index3;
using host::Meeting;
using host::Scope;
using host::SIMDGROUP_THREADS;
using host::SLOT_BYTES;

namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t GUARD_BYTES = 64 << 10; // out of bounds, below each stack
// An Apple GPU takes up to 1024, but fewer the more registers the kernel has, which only its
// compiler knows. MLX's own matrix products keep to so many.
constexpr unsigned MAX_THREADS = 256;
constexpr size_t MAX_THREADGROUP_BYTES = 32 << 10;
constexpr unsigned char POISON = 0xff; // NaN in every float format
constexpr Meeting END = {Scope::End, "the end of the kernel", 0};

// ---------------------------------------------------------------- the job

struct Buffer {
  unsigned char* data;
  int64_t bytes;
  bool output;
  std::vector<unsigned> last_read; // per byte: the last threadgroup that read it, from 1
};

struct Job {
  int64_t grid[3];
  int64_t threadgroup[3];
  int64_t order; // FORWARD, REVERSE or the seed of a random order
  int64_t buffers;
};

constexpr int64_t FORWARD = -1;
constexpr int64_t REVERSE = -2;

// Written after the outputs, in this order.
struct Counters {
  int64_t threadgroups;
  int64_t matrix_products;
  int64_t threadgroup_barriers;
  int64_t simdgroup_barriers;
  int64_t simdgroup_functions;
  int64_t threadgroup_bytes;
  int64_t device_bytes_read;
  int64_t device_bytes_read_once;
  int64_t device_bytes_written;
};

Job job;
Counters counters;
std::vector<Buffer> buffers;
std::vector<void*> addresses;

void read_exactly(void* data, size_t bytes) {
  if (fread(data, 1, bytes, stdin) != bytes) {
    host::fail("the job ends early");
  }
}

// Each buffer has an allocation of its own, of exactly its size: a byte beyond is out of bounds.
void read_job() {
  read_exactly(&job, sizeof(job));
  for (int64_t i = 0; i < job.buffers; ++i) {
    int64_t header[3]; // bytes, whether it is an output, whether its contents follow
    read_exactly(header, sizeof(header));
    auto* data = static_cast<unsigned char*>(malloc(header[0]));
    if (header[2]) {
      read_exactly(data, header[0]);
    } else {
      memset(data, POISON, header[0]);
    }
    buffers.push_back({data, header[0], header[1] != 0, {}});
    addresses.push_back(data);
  }
}

void write_results() {
  for (const Buffer& buffer : buffers) {
    if (buffer.output) {
      fwrite(buffer.data, 1, buffer.bytes, stdout);
    }
  }
  fwrite(&counters, sizeof(counters), 1, stdout);
}

// ---------------------------------------------------------------- fibers

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  unsigned char* stack = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer = nullptr; // its fake stack, or its ThreadSanitizer thread
  host::Thread thread;
  Meeting meeting;
  unsigned exchanges = 0; // values left in slots so far
  unsigned barriers[2] = {}; // met so far, of its simdgroup and of its threadgroup
};

Fiber scheduler;
std::vector<Fiber> fibers;
Fiber* running = &scheduler;

void switch_to(Fiber& next) {
  Fiber& previous = *running;
  running = &next;
#if defined(HOST_ASAN)
  __sanitizer_start_switch_fiber(&previous.sanitizer, next.stack, next.stack_bytes);
  swapcontext(&previous.context, &next.context);
  __sanitizer_finish_switch_fiber(previous.sanitizer, nullptr, nullptr);
#elif defined(HOST_TSAN)
  __tsan_switch_to_fiber(next.sanitizer, __tsan_switch_to_fiber_no_sync);
  swapcontext(&previous.context, &next.context);
#else
  // A jump is ten times as fast as swapcontext, which asks the system to keep signal masks.
  if (_setjmp(previous.resume)) {
    return;
  }
  if (next.started) {
    _longjmp(next.resume, 1);
  }
  next.started = true;
  setcontext(&next.context);
#endif
}

// What ThreadSanitizer takes for order: release(x) happens before acquire(x).
void release(void* order) {
#if defined(HOST_TSAN)
  __tsan_release(order);
#endif
  (void)order;
}

void acquire(void* order) {
#if defined(HOST_TSAN)
  __tsan_acquire(order);
#endif
  (void)order;
}

char end_order; // of all threads, before the scheduler reads their outputs

void wait_at(Meeting meeting) {
  running->meeting = meeting;
  switch_to(scheduler);
}

// A fiber is a thread of one threadgroup after the other.
void fiber_main() {
#if defined(HOST_ASAN)
  const void* stack;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &scheduler.stack_bytes);
  scheduler.stack = static_cast<unsigned char*>(const_cast<void*>(stack));
#endif
  for (;;) {
    host::launch(addresses.data(), running->thread);
    release(&end_order);
    wait_at(END);
  }
}

void create_fibers(size_t count) {
  fibers.resize(count);
  scheduler.started = true;
#if defined(HOST_TSAN)
  scheduler.sanitizer = __tsan_get_current_fiber();
#endif
  for (Fiber& fiber : fibers) {
    void* memory = mmap(
        nullptr,
        GUARD_BYTES + STACK_BYTES,
        PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS,
        -1,
        0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE)) {
      host::fail("no memory for the stacks of %zu threads", count);
    }
    fiber.stack = static_cast<unsigned char*>(memory) + GUARD_BYTES;
    fiber.stack_bytes = STACK_BYTES;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = fiber.stack_bytes;
    makecontext(&fiber.context, fiber_main, 0);
#if defined(HOST_TSAN)
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
}

// Whatever runs a thread, a thread of the same index in the next threadgroup runs elsewhere:
// ThreadSanitizer then sees a race where two threadgroups write one place.
Fiber& fiber_of(unsigned thread) {
  return fibers[(thread + counters.threadgroups) % fibers.size()];
}

// ---------------------------------------------------------------- one threadgroup

// Two sets of slots, used in turn: a lane may leave its next value while others still read.
struct Simdgroup {
  unsigned char slots[2][SIMDGROUP_THREADS * SLOT_BYTES];
  char barrier_order[2];
};

// No thread of the kernel allocates and frees the memory of a threadgroup, so
// ThreadSanitizer is to see neither as an access.
struct Unseen {
  Unseen() {
#if defined(HOST_TSAN)
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Unseen() {
#if defined(HOST_TSAN)
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
  }
};

// On the heap, one per threadgroup: the sanitizers then keep them apart.
struct Threadgroup {
  unsigned threads;
  std::vector<Simdgroup> simdgroups;
  char barrier_order[2];
  unsigned char* variables[host::MAX_THREADGROUP_VARIABLES] = {};
  size_t variable_bytes = 0;

  explicit Threadgroup(unsigned threads)
      : threads(threads),
        simdgroups((threads + SIMDGROUP_THREADS - 1) / SIMDGROUP_THREADS) {}

  ~Threadgroup() {
    const Unseen unseen;
    for (unsigned char* variable : variables) {
      free(variable);
    }
  }

  unsigned char* allocate(size_t bytes) {
    variable_bytes += bytes;
    if (variable_bytes > MAX_THREADGROUP_BYTES) {
      host::fail("more than %zu bytes of threadgroup memory", MAX_THREADGROUP_BYTES);
    }
    counters.threadgroup_bytes = std::max<int64_t>(counters.threadgroup_bytes, variable_bytes);
    const Unseen unseen;
    auto* variable = static_cast<unsigned char*>(malloc(bytes));
    memset(variable, POISON, bytes);
    return variable;
  }
};

std::unique_ptr<Threadgroup> group;
std::mt19937 random_numbers;

std::vector<int64_t> in_order(int64_t first, int64_t last) {
  std::vector<int64_t> order;
  for (int64_t i = first; i < last; ++i) {
    order.push_back(i);
  }
  if (job.order == REVERSE) {
    std::reverse(order.begin(), order.end());
  } else if (job.order != FORWARD) {
    std::shuffle(order.begin(), order.end(), random_numbers);
  }
  return order;
}

bool same(const Meeting& a, const Meeting& b) {
  return a.scope == b.scope && a.line == b.line && !strcmp(a.operation, b.operation);
}

std::string text(const Meeting& meeting) {
  const bool end = meeting.scope == Scope::End;
  return meeting.operation + (end ? "" : " (line " + std::to_string(meeting.line) + ")");
}

// All of them must have come to the same place.
void check_together(unsigned first, unsigned last) {
  for (unsigned i = first + 1; i < last; ++i) {
    const Meeting &a = fiber_of(first).meeting, &b = fiber_of(i).meeting;
    if (!same(a, b)) {
      host::fail(
          "divergent threads: thread %u is at %s, thread %u at %s",
          first,
          text(a).c_str(),
          i,
          text(b).c_str());
    }
  }
}

// Runs a simdgroup until it waits for the other simdgroups or ends.
void run_simdgroup(unsigned first, unsigned last) {
  do {
    for (int64_t thread : in_order(first, last)) {
      switch_to(fiber_of(thread));
    }
    check_together(first, last);
  } while (fiber_of(first).meeting.scope == Scope::Simdgroup);
}

void run_threadgroup() {
  do {
    for (int64_t simdgroup : in_order(0, group->simdgroups.size())) {
      const unsigned first = simdgroup * SIMDGROUP_THREADS;
      run_simdgroup(first, std::min(first + SIMDGROUP_THREADS, group->threads));
    }
    check_together(0, group->threads);
  } while (fiber_of(0).meeting.scope != Scope::End);
}

// ---------------------------------------------------------------- the grid

unsigned product(Index3 size) {
  return size.x * size.y * size.z;
}

// The position of the index-th element of a box, x first.
Index3 position(unsigned index, Index3 size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

// As Metal's dispatchThreads: the threadgroups at the grid's far edges may be smaller.
void run_grid() {
  const Index3 grid = {unsigned(job.grid[0]), unsigned(job.grid[1]), unsigned(job.grid[2])};
  const Index3 full = {
      unsigned(job.threadgroup[0]), unsigned(job.threadgroup[1]), unsigned(job.threadgroup[2])};
  if (product(full) > MAX_THREADS) {
    host::fail("%u threads in a threadgroup, more than %u", product(full), MAX_THREADS);
  }
  const Index3 groups = {
      (grid.x + full.x - 1) / full.x,
      (grid.y + full.y - 1) / full.y,
      (grid.z + full.z - 1) / full.z};
  create_fibers(product(full) + 1);
  random_numbers.seed(job.order);

  for (int64_t index : in_order(0, product(groups))) {
    const Index3 place = position(index, groups);
    const Index3 origin = {place.x * full.x, place.y * full.y, place.z * full.z};
    const Index3 size = {
        std::min(full.x, grid.x - origin.x),
        std::min(full.y, grid.y - origin.y),
        std::min(full.z, grid.z - origin.z)};
    group.reset(new Threadgroup(product(size)));
    for (unsigned i = 0; i < group->threads; ++i) {
      const Index3 local = position(i, size);
      fiber_of(i).exchanges = 0;
      fiber_of(i).barriers[0] = fiber_of(i).barriers[1] = 0;
      host::Thread& thread = fiber_of(i).thread;
      thread.thread_position_in_grid = {
          origin.x + local.x, origin.y + local.y, origin.z + local.z};
      thread.thread_position_in_threadgroup = local;
      thread.threadgroup_position_in_grid = place;
      thread.threads_per_grid = grid;
      thread.threads_per_threadgroup = size;
      thread.dispatch_threads_per_threadgroup = full;
      thread.threadgroups_per_grid = groups;
      thread.thread_index_in_threadgroup = i;
      thread.thread_index_in_simdgroup = i % SIMDGROUP_THREADS;
      thread.simdgroup_index_in_threadgroup = i / SIMDGROUP_THREADS;
      thread.simdgroups_per_threadgroup = group->simdgroups.size();
      thread.threads_per_simdgroup = SIMDGROUP_THREADS;
    }
    run_threadgroup();
    ++counters.threadgroups;
  }
  acquire(&end_order);
}

Simdgroup& own_simdgroup() {
  return group->simdgroups[running->thread.simdgroup_index_in_threadgroup];
}

Buffer* find_buffer(const void* address) {
  for (Buffer& buffer : buffers) {
    if (address >= buffer.data && address < buffer.data + buffer.bytes) {
      return &buffer;
    }
  }
  return nullptr;
}

void count_read(const void* address, int64_t bytes) {
  Buffer* buffer = find_buffer(address);
  if (!buffer) {
    return; // a thread's or a threadgroup's own
  }
  counters.device_bytes_read += bytes;
  buffer->last_read.resize(buffer->bytes);
  const int64_t start = static_cast<const unsigned char*>(address) - buffer->data;
  for (int64_t i = start; i < start + bytes; ++i) {
    const unsigned reader = counters.threadgroups + 1;
    counters.device_bytes_read_once += buffer->last_read[i] != reader;
    buffer->last_read[i] = reader;
  }
}

void count_write(const void* address, int64_t bytes) {
  if (find_buffer(address)) {
    counters.device_bytes_written += bytes;
  }
}

} // namespace

// ---------------------------------------------------------------- what the kernel calls

namespace host {

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  _Exit(1);
}

void barrier(Meeting meeting, bool orders_memory) {
  const bool whole = meeting.scope == Scope::Threadgroup;
  if (whole ? running->thread.thread_index_in_threadgroup == 0 : lane() == 0) {
    ++(whole ? counters.threadgroup_barriers : counters.simdgroup_barriers);
  }
  // In turn too: a thread ahead must not seem ordered before one that has yet to leave.
  const unsigned turn = running->barriers[whole]++ % 2;
  char* order = whole ? &group->barrier_order[turn] : &own_simdgroup().barrier_order[turn];
  if (orders_memory) {
    release(order);
  }
  wait_at(meeting);
  if (orders_memory) {
    acquire(order);
  }
}

void* own_slot() {
  return own_simdgroup().slots[running->exchanges % 2] + lane() * SLOT_BYTES;
}

const unsigned char* meet(Meeting meeting) {
  counters.simdgroup_functions += lane() == 0;
  const unsigned char* slots = own_simdgroup().slots[running->exchanges++ % 2];
  wait_at(meeting);
  return slots;
}

unsigned lane() {
  return running->thread.thread_index_in_simdgroup;
}

unsigned lanes() {
  const unsigned first = running->thread.simdgroup_index_in_threadgroup * SIMDGROUP_THREADS;
  return std::min(SIMDGROUP_THREADS, group->threads - first);
}

void* threadgroup_memory(unsigned index, size_t bytes) {
  unsigned char*& variable = group->variables[index];
  if (!variable) {
    variable = group->allocate(bytes);
  }
  return variable;
}

void count_matrix_product() {
  counters.matrix_products += lane() == 0;
}

} // namespace host

// Called for every load and store of a kernel compiled with -fsanitize-coverage.
#define COUNT_ACCESS(bytes)                                           \
  extern "C" void __sanitizer_cov_load##bytes(const void* address) {  \
    count_read(address, bytes);                                       \
  }                                                                   \
  extern "C" void __sanitizer_cov_store##bytes(const void* address) { \
    count_write(address, bytes);                                      \
  }

COUNT_ACCESS(1)
COUNT_ACCESS(2)
COUNT_ACCESS(4)
COUNT_ACCESS(8)
COUNT_ACCESS(16)

int main() {
  read_job();
  run_grid();
  write_results();
}
