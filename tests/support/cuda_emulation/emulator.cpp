// Threads of a block as coroutines on the CPU; see cuda_runtime.h.
//
// A thread has a stack of its own. makecontext starts it there, once for all blocks of all launches
// of its size; from then on setjmp and longjmp switch, because swapcontext asks the kernel twice.
#undef _FORTIFY_SOURCE  // its longjmp refuses to leave for another stack
#include "cuda_runtime.h"

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

dim3 gridDim(1), blockDim(1), blockIdx(0), threadIdx(0);

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // each thread has a copy of the kernel's parameters

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

const std::function<void()>* call;
jmp_buf scheduler;
std::mt19937 generator;  // the same orders in every process

void run_forever();

struct Thread {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};  // uninitialised: mostly never touched
  ucontext_t beginning;
  jmp_buf place;
  bool begun = false;
  State state = State::kDone;
  uint64_t value = 0;  // what it shows its warp

  Thread() {
    getcontext(&beginning);
    beginning.uc_stack.ss_sp = stack.get();
    beginning.uc_stack.ss_size = kStackBytes;
    beginning.uc_link = nullptr;
    makecontext(&beginning, run_forever, 0);
  }
};

std::vector<Thread> threads;  // never copied or moved: a context may point into itself

// From a thread to the scheduler, until it resumes the thread.
void suspend(State state) {
  Thread& thread = threads[threadIdx.x];
  thread.state = state;
  if (_setjmp(thread.place) == 0) _longjmp(scheduler, 1);
}

// From the scheduler to a thread, until that is suspended.
void resume(unsigned int index) {
  Thread& thread = threads[index];
  threadIdx.x = index;
  if (_setjmp(scheduler) != 0) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  setcontext(&thread.beginning);
}

void run_forever() {
  for (;;) {
    (*call)();
    suspend(State::kDone);
  }
}

bool all(size_t first, size_t count, State state) {
  const auto begin = threads.begin() + first;
  return std::all_of(begin, begin + count, [=](const Thread& t) { return t.state == state; });
}

// Lets the threads go on if all of them have reached the barrier.
void open(size_t first, size_t count, State barrier) {
  if (!all(first, count, barrier)) return;
  for (size_t i = first; i < first + count; ++i) threads[i].state = State::kReady;
}

void run_block() {
  const size_t count = threads.size();
  std::vector<unsigned int> order(count);
  std::iota(order.begin(), order.end(), 0u);
  for (Thread& thread : threads) thread.state = State::kReady;
  for (bool resumed = true; resumed;) {
    resumed = false;
    std::shuffle(order.begin(), order.end(), generator);
    for (const unsigned int i : order) {
      if (threads[i].state != State::kReady) continue;
      resume(i);
      resumed = true;
    }
    for (size_t first = 0; first < count; first += kWarp) {
      open(first, kWarp, State::kAtWarpBarrier);
    }
    open(0, count, State::kAtBlockBarrier);
  }
  if (!all(0, count, State::kDone)) {
    threads.clear();  // they are somewhere in the kernel
    throw std::logic_error("block " + std::to_string(blockIdx.x) +
                           ": a barrier that some of its threads never reach");
  }
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t, cudaStream_t, const std::function<void()>& kernel) {
  if (block.x % kWarp != 0) throw std::logic_error("a block that is not made of whole warps");
  call = &kernel;
  gridDim = grid;
  blockDim = block;
  if (threads.size() != block.x) threads = std::vector<Thread>(block.x);
  std::vector<unsigned int> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), generator);
  for (const unsigned int index : order) {
    blockIdx.x = index;
    run_block();
  }
}

std::array<uint64_t, kWarp> lanes(uint64_t value) {
  threads[threadIdx.x].value = value;
  __syncwarp();
  std::array<uint64_t, kWarp> values;
  const size_t first = threadIdx.x / kWarp * kWarp;
  for (size_t i = 0; i < kWarp; ++i) values[i] = threads[first + i].value;
  __syncwarp();  // before anybody shows something else
  return values;
}

}  // namespace emulation

void __syncthreads() { emulation::suspend(emulation::State::kAtBlockBarrier); }
void __syncwarp() { emulation::suspend(emulation::State::kAtWarpBarrier); }
