// Fibers, and who runs next.
#include <signal.h>
#include <setjmp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

Machine machine;

namespace {

constexpr size_t kStack = 128 * 1024, kPage = 4096;

std::vector<char*> stacks;
void* main_stack_pointer;
sigjmp_buf escape;  // back to resume_all, from a fault

#if defined(__x86_64__)
// Saves the registers that a called function must keep, and the stack pointer in *save; continues
// on `load`.
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
void* new_stack(char* memory, void (*entry)()) {
  void** top = reinterpret_cast<void**>(memory + kStack - 16);
  *--top = nullptr;  // where entry would return to; it also aligns the stack
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}
#elif defined(__aarch64__)
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "sub sp, sp, #160\n\t"
      "stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, "
      "#48]\n\t"
      "stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]; stp d8, d9, [sp, #96]; stp d10, d11, [sp, "
      "#112]\n\t"
      "stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]\n\t"
      "mov x9, sp; str x9, [x0]; mov sp, x1\n\t"
      "ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, "
      "#48]\n\t"
      "ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]; ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, "
      "#112]\n\t"
      "ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]\n\t"
      "add sp, sp, #160; ret");
}
void* new_stack(char* memory, void (*entry)()) {
  void** top = reinterpret_cast<void**>(memory + kStack - 160);
  std::memset(top, 0, 160);
  top[11] = reinterpret_cast<void*>(entry);  // x30
  return top;
}
#else
#error "cuda_on_cpu switches stacks on x86-64 and aarch64 only"
#endif

char* stack_memory(size_t i) {
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    mprotect(p, kPage, PROT_NONE);  // an overflow faults
    stacks.push_back(static_cast<char*>(p));
  }
  return stacks[i];
}

void become(Fiber* fiber) {
  machine.current = fiber;
  threadIdx = fiber->thread;
  blockIdx = fiber->block->index;
}

Fiber* take_ready() {
  Machine& m = machine;
  if (m.first_ready == m.ready.size()) return nullptr;
  if (m.seed) {
    const size_t other = m.first_ready + random_number() % (m.ready.size() - m.first_ready);
    std::swap(m.ready[m.first_ready], m.ready[other]);
  }
  Fiber* fiber = m.ready[m.first_ready++];
  if (m.first_ready > 64 && m.first_ready > m.ready.size() / 2) {
    m.ready.erase(m.ready.begin(), m.ready.begin() + static_cast<long>(m.first_ready));
    m.first_ready = 0;
  }
  return fiber;
}

std::string deadlock() {
  std::map<std::string, std::pair<int, std::string>> groups;
  for (auto& f : machine.fibers) {
    if (!f->waits) continue;
    auto& [count, example] = groups[std::string(f->waits) + " at " + place(f->where)];
    if (count++ == 0) example = thread_name(*f);
  }
  std::string text = "deadlock:";
  for (auto& [what, group] : groups) {
    text += " " + std::to_string(group.first) + " threads wait for " + what +
            " (first: " + group.second + ");";
  }
  return text;
}

void resume_next() {
  Fiber* from = machine.current;
  Fiber* next = take_ready();
  if (machine.seed && !machine.deliveries.empty() && random_number() % 4 == 0) deliver_one();
  while (!next && deliver_one()) next = take_ready();
  if (!next && machine.alive) machine.error = deadlock();
  if (next == from) return;
  machine.switches++;
  if (next) {
    become(next);
    switch_stack(&from->stack_pointer, next->stack_pointer);
  } else {
    switch_stack(&from->stack_pointer, main_stack_pointer);
  }
}

void fiber_main() {
  (*machine.body)();
  self().waits = nullptr;
  leave();
  resume_next();
  std::abort();
}

std::string fault_text(const unsigned char* address) {
  const Fiber& f = self();
  std::string text = "invalid address in " + thread_name(f);
  const unsigned char* stack = reinterpret_cast<unsigned char*>(stacks[f.id]);
  if (address >= stack && address < stack + kPage) return text + ": its stack overflows";
  for (auto& b : machine.blocks) {
    const long offset = address - b->shared;
    if (offset >= 0 && offset < static_cast<long>(machine.shared_bytes + kGuard)) {
      if (b->alive == 0) return text + ": shared memory of a block that has left";
      return text + ": byte " + std::to_string(offset) + " of " +
             std::to_string(machine.shared_bytes) + " bytes of shared memory";
    }
  }
  return text + ": not shared memory, so global memory";
}

void on_fault(int, siginfo_t* info, void*) {
  if (!machine.current) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  if (machine.error.empty()) machine.error = fault_text(static_cast<unsigned char*>(info->si_addr));
  siglongjmp(escape, 1);
}

class FaultHandler {  // turns invalid addresses into errors of the launch, on a stack of its own
 public:
  FaultHandler() {
    static char memory[64 * 1024];
    stack_t stack{};
    stack.ss_sp = memory;
    stack.ss_size = sizeof memory;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~FaultHandler() {
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  stack_t old_stack_;
  struct sigaction old_segv_, old_bus_;
};

}  // namespace

uint64_t random_number() {  // xorshift64
  uint64_t& s = machine.random_state;
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return s;
}

std::string place(Here where) {
  const char* file = where.file_name();
  const char* slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(where.line());
}

std::string thread_name(const Fiber& f) {
  const Machine& m = machine;
  const uint3 b = f.block->index, t = f.thread;
  return "block " + std::to_string(b.x + m.grid.x * (b.y + m.grid.y * b.z)) + " thread " +
         std::to_string(t.x + m.block.x * (t.y + m.block.y * t.z));
}

void fail(const std::string& why) {
  machine.error = why + " (" + thread_name(self()) + ")";
  switch_stack(&self().stack_pointer, main_stack_pointer);
  std::abort();
}

void wait(const char* what, Here where) {
  self().waits = what;
  self().where = where;
  resume_next();
  self().waits = nullptr;
}

void wake(std::vector<Fiber*>& waiting) {
  machine.ready.insert(machine.ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

void yield() {
  machine.ready.push_back(machine.current);
  resume_next();
}

void maybe_yield() {
  if (machine.seed) yield();
}

void flags_changed() {
  machine.progress++;
  wake(machine.polling);
  maybe_yield();
}

// Runs every fiber to its end. False if the launch failed.
bool resume_all() {
  Machine& m = machine;
  m.ready.clear();
  m.polling.clear();
  m.deliveries.clear();
  m.shared_barriers.clear();
  m.first_ready = 0;
  m.alive = m.fibers.size();
  for (size_t i = 0; i < m.fibers.size(); i++) {
    Fiber& f = *m.fibers[i];
    f.id = static_cast<unsigned>(i);
    f.stack_pointer = new_stack(stack_memory(i), fiber_main);
    m.ready.push_back(&f);
  }
  FaultHandler handler;
  if (sigsetjmp(escape, 1) == 0) {
    Fiber* first = take_ready();
    become(first);
    switch_stack(&main_stack_pointer, first->stack_pointer);
  }
  m.current = nullptr;
  return m.error.empty();
}

}  // namespace cuda_on_cpu
