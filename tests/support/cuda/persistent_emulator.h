// A CPU emulator of the device functions in xprnn/kernels/cuda/persistent_device.cu. Each CUDA thread is a fiber;
// clusters run one after the other. A seed decides what the hardware leaves open, often in unfavorable order: which
// warp runs, and when a message arrives. Shared memory starts as NaN. The run ends with an error message where the
// hardware would fail or hang: divergent shuffles, misaligned or out-of-bounds addresses, writes to a block that has
// exited, uses of an uninitialized barrier, too many bytes on a barrier, and waits that never end.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <csetjmp>
#include <map>
#include <memory>
#include <utility>
#include <vector>
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __restrict__ __restrict
#define XP_DEV static inline
#define XP_MEMBER inline
#define XP_KERNEL extern "C" void
typedef unsigned int u32;
typedef unsigned long long u64;

enum Blocked { READY, SHUFFLE, BARRIER, BLOCK_SYNC, CLUSTER_SYNC, EXITED };
enum Schedule { FAIR, RANDOM, LATE, SLOW_BLOCK, SLOW_WARP, SCHEDULES };

struct Barrier { int pending = 0, phase = 0; long bytes = 0; bool ready = false; };
struct SyncPoint { unsigned round = 0; int here = 0; };  // all threads of a group must arrive here
struct Block;
struct Warp { Block* block; SyncPoint shuffle; float value[2][32]; int kind[2]; int first; };
struct Block {
  int rank; size_t bytes; std::unique_ptr<char[]> memory; std::map<size_t, Barrier> barriers; SyncPoint sync;
  int running;
};
struct Fiber {
  ucontext_t context; jmp_buf jump; std::unique_ptr<char[]> stack; Warp* warp; int thread; bool begun = false;
  Blocked blocked = READY; unsigned round = 0; Barrier* barrier = nullptr; int parity = 0; void* fake = nullptr;
};
struct Message { Block* to; size_t at, barrier; float v[4]; };
struct Machine {
  int cluster; std::vector<Block> blocks; std::vector<Warp> warps; std::vector<Fiber> fibers; std::vector<Message> mail;
  SyncPoint sync; Fiber* now = nullptr; ucontext_t scheduler; jmp_buf back; void* fake = nullptr;
  const void* stack = nullptr; size_t stack_bytes = 0; Schedule schedule; u32 random; char* error;
  void (*run)(const u64*); const u64* args;
  u32 draw(u32 n) { random = random * 1664525u + 1013904223u; return (random >> 8) % n; }
};
static Machine* M_;
static constexpr size_t STACK = 64 << 10;

// --- fibers

static void leave_fiber(bool exits) {
  Fiber* f = M_->now;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(exits ? nullptr : &f->fake, M_->stack, M_->stack_bytes);
  swapcontext(&f->context, &M_->scheduler);
  __sanitizer_finish_switch_fiber(f->fake, &M_->stack, &M_->stack_bytes);
#else
  (void)exits;
  if (!_setjmp(f->jump)) _longjmp(M_->back, 1);
#endif
}

static void fail(const char* what) {
  Fiber* f = M_->now;
  if (!*M_->error && !f) snprintf(M_->error, 200, "cluster %d, a message: %s", M_->cluster, what);
  if (!*M_->error) snprintf(M_->error, 200, "cluster %d, block %d, thread %d: %s", M_->cluster, f->warp->block->rank,
                            f->thread, what);
  while (f) leave_fiber(true);  // the run has ended
}

static void begin_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &M_->stack, &M_->stack_bytes);
#endif
  M_->run(M_->args);
  M_->now->blocked = EXITED;
  M_->now->warp->block->running--;
  leave_fiber(true);
}

static void enter_fiber(Fiber& f) {
  M_->now = &f;
  if (!f.begun) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, begin_fiber, 0);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&M_->fake, f.stack.get(), STACK);
  f.begun = true;
  swapcontext(&M_->scheduler, &f.context);
  __sanitizer_finish_switch_fiber(M_->fake, nullptr, nullptr);
#else
  if (_setjmp(M_->back)) return;
  if (f.begun) _longjmp(f.jump, 1);
  f.begun = true;
  setcontext(&f.context);
#endif
}

static void block_fiber(Blocked why) { M_->now->blocked = why; leave_fiber(false); }

static void arrive(SyncPoint& g, Blocked why) {
  M_->now->round = g.round;
  ++g.here;
  block_fiber(why);
}

// --- device functions that kernels call

XP_DEV float* xp_shared() { return (float*)M_->now->warp->block->memory.get(); }
XP_DEV int xp_thread() { return M_->now->thread; }
XP_DEV int xp_rank() { return M_->now->warp->block->rank; }
XP_DEV int xp_cluster() { return M_->cluster; }
XP_DEV int xp_opaque(int v) { return v; }
XP_DEV void xp_block_sync() { arrive(M_->now->warp->block->sync, BLOCK_SYNC); }
XP_DEV void xp_cluster_sync() { arrive(M_->sync, CLUSTER_SYNC); }

// Return the offset of an address in the block's shared memory, after checking it.
static size_t offset(const void* p, size_t bytes) {
  const Block& b = *M_->now->warp->block;
  const size_t at = (const char*)p - b.memory.get();
  if ((const char*)p < b.memory.get() || at + bytes > b.bytes) fail("an address outside of shared memory");
  if (at % bytes) fail("a misaligned address in shared memory");
  return at;
}

static Barrier& barrier_of(Block& b, size_t at) {
  Barrier& bar = b.barriers[at];
  if (!bar.ready) fail("a barrier that is not initialised");
  return bar;
}

// Count arrivals and bytes on a barrier; complete its phase if none are pending.
static void count(Barrier& bar, int arrivals, long bytes) {
  bar.pending -= arrivals;
  bar.bytes += bytes;
  if (bar.pending < 0) fail("two arrivals in one phase of a barrier");
  if (bar.bytes >= 1 << 20 || bar.bytes <= -(1 << 20)) fail("more bytes than a barrier counts");
  if (bar.pending == 0 && bar.bytes == 0) bar.phase ^= 1, bar.pending = 1;
}

XP_DEV void xp_barrier_init(u64* bar) {
  Barrier& b = M_->now->warp->block->barriers[offset(bar, 8)];
  if (b.ready) fail("a barrier initialised twice");
  b.ready = true;
  b.pending = 1;
}
XP_DEV void xp_barrier_expect(u64* bar, int bytes) {
  count(barrier_of(*M_->now->warp->block, offset(bar, 8)), 1, bytes);
}
XP_DEV void xp_barrier_wait(u64* bar, int parity) {
  M_->now->barrier = &barrier_of(*M_->now->warp->block, offset(bar, 8));
  M_->now->parity = parity;
  block_fiber(BARRIER);
}

static void deliver(size_t k) {
  const Message m = M_->mail[k];
  M_->mail[k] = M_->mail.back();
  M_->mail.pop_back();
  if (!m.to->running) fail("a message to a block that has exited");
  memcpy(m.to->memory.get() + m.at, m.v, sizeof m.v);
  count(barrier_of(*m.to, m.barrier), 0, -(long)sizeof m.v);
}

XP_DEV void xp_send4(float* data, const float (&v)[4], u64* bar, int rank) {
  if (rank < 0 || rank >= (int)M_->blocks.size()) fail("no such block");
  Message m = {&M_->blocks[rank], offset(data, 16), offset(bar, 8), {v[0], v[1], v[2], v[3]}};
  if (!m.to->running) fail("a message to a block that has exited");
  M_->mail.push_back(m);
  if (M_->schedule != LATE && M_->schedule != RANDOM) deliver(M_->mail.size() - 1);
}

static float shuffle(float v, int from, int kind) {
  Fiber* f = M_->now;
  Warp& w = *f->warp;
  const int turn = w.shuffle.round & 1, lane = f->thread % 32;
  if (!w.shuffle.here) w.kind[turn] = kind;
  if (w.kind[turn] != kind) fail("lanes of a warp meet in different shuffles");
  w.value[turn][lane] = v;
  arrive(w.shuffle, SHUFFLE);
  return w.value[turn][from];
}
XP_DEV float xp_swap(float v, int mask) { return shuffle(v, (M_->now->thread % 32) ^ mask, mask); }
XP_DEV float xp_fetch(float v, int lane) { return shuffle(v, lane, 64); }

XP_DEV void xp_read(float (&v)[4], const float* p) { offset(p, 16); memcpy(v, p, 16); }
XP_DEV void xp_read(float (&v)[2], const float* p) { offset(p, 8); memcpy(v, p, 8); }
XP_DEV void xp_write(float* p, const float (&v)[4]) { offset(p, 16); memcpy(p, v, 16); }

// --- scheduler

static bool passes(SyncPoint& g, Fiber& f, int all) {
  if (g.round == f.round && g.here >= all) g.here = 0, ++g.round;
  return g.round != f.round;
}

// Return true if the fiber can continue.
static bool ready(Fiber& f) {
  switch (f.blocked) {
    case READY: return true;
    case SHUFFLE: return passes(f.warp->shuffle, f, 32);  // a lane that has exited never arrives, as on hardware
    case BARRIER: return f.barrier->phase != f.parity;
    case BLOCK_SYNC: return passes(f.warp->block->sync, f, f.warp->block->running);
    case CLUSTER_SYNC: {
      int running = 0;
      for (Block& b : M_->blocks) running += b.running;
      return passes(M_->sync, f, running);
    }
    case EXITED: return false;
  }
  return false;
}

// Run a warp until all its lanes are blocked. Return true if a lane ran.
static bool run_warp(Warp& w) {
  bool any = false;
  const int flip = M_->schedule == FAIR ? 0 : (int)M_->draw(32);  // the order of lanes varies too
  for (bool more = true; more && !*M_->error;) {
    more = false;
    for (int k = 0; k < 32 && !*M_->error; ++k) {
      Fiber& f = M_->fibers[w.first + (k ^ flip)];
      if (!ready(f)) continue;
      f.blocked = READY;
      enter_fiber(f);
      any = more = true;
    }
  }
  return any;
}

static void run_cluster() {
  Machine& m = *M_;
  const size_t count = m.warps.size();
  const u32 slow = m.draw(m.schedule == SLOW_BLOCK ? m.blocks.size() : count);
  for (;;) {
    const u32 start = m.schedule == FAIR ? 0 : m.draw(count);
    bool any = false, left = false;
    for (int delayed = 0; delayed < 2 && !any; ++delayed)
      for (size_t k = 0; k < count && !any; ++k) {
        const size_t i = (start + k) % count;
        const bool late = (m.schedule == SLOW_BLOCK && (u32)m.warps[i].block->rank == slow) ||
                          (m.schedule == SLOW_WARP && i == slow);
        if (late == (delayed == 1)) any = run_warp(m.warps[i]);
        if (*m.error) return;
      }
    if (!m.mail.empty() && (!any || (m.schedule == RANDOM && m.draw(2)))) {
      for (u32 n = any ? m.draw(m.mail.size()) : 0; n + 1 && !m.mail.empty(); --n) {
        m.now = nullptr;
        deliver(m.draw(m.mail.size()));
      }
      if (*m.error) return;
      continue;
    }
    for (Fiber& f : m.fibers) left |= f.blocked != EXITED;
    if (!left) return;
    if (!any) {
      for (Fiber& f : m.fibers)
        if (f.blocked != EXITED) {
          const char* names[] = {"nothing", "a shuffle", "a barrier", "a block", "a cluster"};
          snprintf(m.error, 200, "cluster %d, block %d, thread %d waits forever for %s", m.cluster, f.warp->block->rank,
                   f.thread, names[f.blocked]);
          return;
        }
    }
  }
}

static void launch(void (*run)(const u64*), const u64* args, int clusters, size_t bytes, u32 seed, char* error) {
  for (int c = 0; c < clusters && !*error; ++c) {
    Machine m;
    M_ = &m;
    m.cluster = c, m.run = run, m.args = args, m.error = error;
    m.schedule = Schedule(seed % SCHEDULES), m.random = seed * 2654435761u + c;
    m.blocks.resize(CL), m.warps.resize(CL * NT / 32), m.fibers.resize(CL * NT);
    for (int b = 0; b < CL; ++b) {
      Block& k = m.blocks[b];
      k.rank = b, k.bytes = bytes, k.running = NT;
      k.memory.reset(new char[bytes]);
      memset(k.memory.get(), 0xff, bytes);
    }
    for (int w = 0; w < CL * NT / 32; ++w) m.warps[w].block = &m.blocks[w * 32 / NT], m.warps[w].first = w * 32;
    for (int i = 0; i < CL * NT; ++i) {
      Fiber& f = m.fibers[i];
      f.warp = &m.warps[i / 32], f.thread = i % NT, f.stack.reset(new char[STACK]);
    }
    run_cluster();
    for (Block& b : m.blocks)
      for (auto& at : b.barriers)
        if (!*error && at.second.bytes) snprintf(error, 200, "cluster %d: a barrier waits for bytes at the end", c);
    if (!*error && !m.mail.empty()) snprintf(error, 200, "cluster %d: messages that no block received", c);
  }
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), const u64* a, std::index_sequence<I...>) { kernel((A)a[I]...); }
template <class... A>
static void call(void (*kernel)(A...), const u64* a) { call(kernel, a, std::make_index_sequence<sizeof...(A)>()); }

// Run xp_forward (which = 0) or xp_backward with the arguments `args`; `error` must hold 200 characters.
#define XP_HOST_ENTRY \
  extern "C" void xp_host_run(int which, const u64* args, int clusters, long bytes, u32 seed, char* error) { \
    launch(which ? [](const u64* a) { call(xp_backward, a); } : [](const u64* a) { call(xp_forward, a); }, args, \
           clusters, (size_t)bytes, seed, error); \
  }
