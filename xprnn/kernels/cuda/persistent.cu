// Persistent kernels: one launch computes a whole sequence. The recurrent weight stays in registers and shared memory;
// only states (in backward, gate cotangents) move between blocks.
//
// Batch rows are independent of each other. Each cluster of CL blocks therefore computes B rows for all T steps, and
// clusters never communicate. Inside a cluster the HP hidden units (H of them used, the rest padding) are split over
// blocks, then over warps:
//
//                 all T steps of rows m0 .. m0 + B - 1                            one warp
//      block 0            block 1           ...   block CL-1              RT units, G gates of each:
//   +--------------+   +--------------+        +--------------+        ROWS rows of the weight, each of length K
//   | units        |   | units        |        | units        |         lane 0   1   2  ...  31   0   1  ...
//   | 0 .. UPB-1   |   | UPB .. 2UPB-1|        |   .. HP-1    |        +---+---+---+---+---+---+---+---+
//   | warp 0: RT   |   | warp 0: RT   |        |              |        | V | V | V |       | V | V |     | row 0
//   | warp 1: RT   |   | warp 1: RT   |        |              |        +---+---+---+---+---+---+---+---+
//   |   ...        |   |   ...        |        |              |        |   |   |   |       |   |   |     | row 1
//   +------+-------+   +------+-------+        +------+-------+           chunk 0: 32 V      chunk 1: 32 V
//          |   every block receives all K values      |                 the first chunks in registers, the rest in
//          +---- of its rows: each block sends -------+                 shared memory
//                its units to all blocks (and itself)
//
// The exchanged values are h in forward (K = HP) and the cotangents of the gates in backward (K = G HP). One step:
//
//   1. Wait until all K values of the B rows have arrived.
//   2. Each lane multiplies its columns of the weight.
//   3. Sum over the lanes, so that each (row, unit) ends in one lane with all its gates.
//   4. Apply the cell.
//   5. Write the results to global memory, and send four units at a time to every block.
//
// The sum over lanes halves the data in each round: a lane sends one half of its values and adds the received values
// to the other half. With Q = B RT items, lane l ends with item l / (32 / Q) = row * RT + unit. The first lane of each
// group stores the item.
//
// The exchange has two buffers and two barriers. Exchange e fills buffer e & 1 of every block with exactly 4 B K
// bytes. Its barrier completes when all of these bytes have arrived; thread 0 announces the byte count. A block
// writes exchange e into a peer's buffer only after it has received all of exchange e - 1. The peer's warps sent
// exchange e - 1 after they had read exchange e - 2, the previous content of that buffer. The loop therefore needs
// no other synchronization. A cluster of one block uses its shared memory and a block barrier.
//
// Macros to define: CELL, HP, CL, NT (threads per block), B, KF and KB (chunks in registers, forward and backward).
// Arrays are C-contiguous: x (T,M,G,H), saved (T,M,SAVED,H), states h and c (T+1,M,H), active (T,M) bytes or null for
// all rows, weight (G,H,H). M is the batch size. The initial state is at index 0 of h and c, or at T if `reverse`.

#define UPB (HP / CL)    // units per block
#define RT (UPB / (NT / 32))  // units per warp
#define Q (B * RT)       // (row, unit) items per warp
#define GROUP (32 / Q)   // lanes that end with the same item

static_assert(RT % 4 == 0 && RT * (NT / 32) * CL == HP, "each warp needs a multiple of four units");
static_assert(Q <= 32 && 32 % Q == 0, "at most one item per lane");

typedef long long wide;

// ROWS matrix rows of length K, split over the lanes of a warp in chunks of 32 V columns; KR chunks are in registers.
template <int ROWS, int K, int KR>
struct Slice {
  static constexpr int V = K % 128 ? 2 : 4, CHUNKS = K / (32 * V), SHARED = (CHUNKS - KR) * ROWS * V * NT;
  static_assert(K % 64 == 0 && KR >= 1 && KR <= CHUNKS, "K must be a multiple of the chunk length");
  float in_registers[KR][ROWS][V];
  float* in_shared;

  template <class At>
  XP_MEMBER void load(float* shared, int thread, At at) {
    in_shared = shared + thread * V;
#pragma unroll
    for (int k = 0; k < KR; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int column = xp_opaque((k * 32 + thread % 32) * V + i);  // avoids precomputed addresses in registers
#pragma unroll
        for (int r = 0; r < ROWS; ++r) in_registers[k][r][i] = at(r, column);
      }
#pragma unroll 1
    for (int k = KR; k < CHUNKS; ++k)
#pragma unroll 1
      for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < V; ++i)
          in_shared[((k - KR) * ROWS + r) * V * NT + i] = at(r, (k * 32 + thread % 32) * V + i);
  }

  // sum[r][b]: this lane's part of the dot product of row r with vector b of in (B, K)
  XP_MEMBER void multiply(float (&sum)[ROWS][B], const float* in, int lane) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int b = 0; b < B; ++b) sum[r][b] = 0.f;
#pragma unroll
    for (int k = 0; k < KR; ++k) {
      float v[B][V];
#pragma unroll
      for (int b = 0; b < B; ++b) xp_read(v[b], in + b * K + (k * 32 + lane) * V);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) add(sum[r], in_registers[k][r], v);
    }
#pragma unroll 1  // not unrolled: no registers are left for a second chunk
    for (int k = KR; k < CHUNKS; ++k) {
      float v[B][V];
#pragma unroll
      for (int b = 0; b < B; ++b) xp_read(v[b], in + b * K + (k * 32 + lane) * V);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float w[V];
        xp_read(w, in_shared + ((k - KR) * ROWS + r) * V * NT);
        add(sum[r], w, v);
      }
    }
  }

  XP_MEMBER static void add(float (&sum)[B], const float (&w)[V], const float (&v)[B][V]) {
#pragma unroll
    for (int i = 0; i < V; ++i)
#pragma unroll
      for (int b = 0; b < B; ++b) sum[b] = fmaf(w[i], v[b][i], sum[b]);
  }
};

// Return the sum over all lanes of v[item], where item = lane / GROUP is that of the calling lane.
XP_DEV float lane_sum(float (&v)[Q], int lane) {
#pragma unroll
  for (int s = 0; s < 5; ++s) {
    const int mask = 16 >> s, half = Q >> (s + 1);
    const bool upper = lane & mask;
    if (half == 0) v[0] += xp_swap(v[0], mask);
#pragma unroll
    for (int j = 0; j < Q / 2; ++j)
      if (j < half) {
        const float sent = upper ? v[j] : v[j + half], kept = upper ? v[j + half] : v[j];
        v[j] = kept + xp_swap(sent, mask);
      }
  }
  return v[0];
}

// out[g]: for the row and unit of this lane, the product of gate g's weight row with the vector at `in` (B, K).
template <int GATES, class Weight>
XP_DEV void product(float (&out)[GATES], const Weight& weight, const float* in, int lane) {
  float sum[GATES * RT][B];
  weight.multiply(sum, in, lane);
#pragma unroll
  for (int g = 0; g < GATES; ++g) {
    float v[Q];
#pragma unroll
    for (int b = 0; b < B; ++b)
#pragma unroll
      for (int r = 0; r < RT; ++r) v[b * RT + r] = sum[g * RT + r][b];
    out[g] = lane_sum(v, lane);
  }
}

// Two buffers (B, PARTS, HP) in shared memory. Every block writes its units into the buffers of all blocks.
template <int PARTS>
struct Exchange {
  static constexpr int FLOATS = B * PARTS * HP;
  float* buffer;
  u64* bar;

  XP_MEMBER float* at(int e) const { return buffer + (e & 1) * FLOATS; }

  XP_MEMBER void open(int thread) {
    if (CL > 1 && thread == 0) xp_barrier_init(bar), xp_barrier_init(bar + 1);
  }

  // Announce the bytes of exchange e: once per exchange, by one thread of each block, after waiting for exchange e - 1.
  XP_MEMBER void expect(int e, int thread) const {
    if (CL > 1 && thread == 0) xp_barrier_expect(bar + (e & 1), 4 * FLOATS);
  }

  // Send this lane's item of each part to every block. All lanes must call it; unit0 is the warp's first unit.
  XP_MEMBER void send(int e, const float (&v)[PARTS], int unit0, int lane) const {
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
#pragma unroll
      for (int j0 = 0; j0 < Q / 4 * CL; j0 += 32) {
        const int j = j0 + lane, four = j / CL, b = four / (RT / 4), r = four % (RT / 4) * 4;
        float o[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) o[i] = xp_fetch(v[p], (four * 4 + i) * GROUP & 31);
        if (j >= Q / 4 * CL) continue;
        float* to = at(e) + (b * PARTS + p) * HP + unit0 + r;
        if (CL > 1) xp_send4(to, o, bar + (e & 1), j % CL);
        else xp_write(to, o);
      }
  }

  XP_MEMBER void wait(int e) const {
    if (CL > 1) xp_barrier_wait(bar + (e & 1), e >> 1 & 1);
    else xp_block_sync();
  }
};

// The (row, unit) pair that a lane computes.
struct Item {
  int lane, thread, unit0, unit, row0, row;
  bool valid, stores;  // inside the arrays; this lane stores the item

  XP_MEMBER Item(int M, int H) {
    thread = xp_thread(), lane = thread % 32;
    unit0 = xp_rank() * UPB + thread / 32 * RT;
    unit = unit0 + lane / GROUP % RT;
    row0 = xp_cluster() * B;
    row = row0 + lane / GROUP / RT;
    valid = row < M && unit < H;
    stores = valid && lane % GROUP == 0;
  }
};

#if CELL == LSTM
#define HAS_C 1
#else
#define HAS_C 0
#endif

// bias (G,H): added to x. bn (H): the GRU's bias that the reset gate multiplies. Either is null if absent.
XP_KERNEL xp_forward(const float* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ bn,
                     const float* __restrict__ x, const unsigned char* __restrict__ active, float* h, float* c,
                     float* saved, int T, int M, int H, int reverse) {
  const Item item(M, H);
  Slice<G * RT, HP, KF> u;
  Exchange<1> exchange = {xp_shared() + u.SHARED, (u64*)(xp_shared() + u.SHARED + 2 * B * HP)};
  u.load(xp_shared(), item.thread, [&](int r, int k) {
    const int unit = item.unit0 + r % RT;
    return unit < H && k < H ? weight[((wide)(r / RT) * H + unit) * H + k] : 0.f;
  });
  const wide first = reverse ? T - 1 : 0, dt = reverse ? -1 : 1, initial = reverse ? T : 0;
  const wide MH = (wide)M * H, offset = (wide)item.row * H + item.unit;
  for (int i = item.thread; i < B * HP; i += NT) {
    const int row = item.row0 + i / HP, k = i % HP;
    exchange.at(1)[i] = row < M && k < H ? h[initial * MH + (wide)row * H + k] : 0.f;
  }
  State state = {0.f, 0.f};
  float bias_reg[G] = {}, bn_reg = 0.f, xt[G], x_next[G] = {};
  bool is_active, active_next = true;
  const auto fetch = [&](wide t) {
#pragma unroll
    for (int g = 0; g < G; ++g) x_next[g] = x[((t * M + item.row) * G + g) * H + item.unit];
    if (active) active_next = active[t * M + item.row];
  };
  if (item.valid) {
    state.h = h[initial * MH + offset];
    if (HAS_C) state.c = c[initial * MH + offset];
    if (bias)
      for (int g = 0; g < G; ++g) bias_reg[g] = bias[g * H + item.unit];
    if (CELL == GRU && bn) bn_reg = bn[item.unit];
    fetch(first);
  }
  exchange.open(item.thread);
  xp_cluster_sync();
#pragma unroll 1
  for (int i = 0; i < T; ++i) {
    const wide t = first + dt * i;
    if (i > 0) exchange.wait(i - 1);
    if (i + 1 < T) exchange.expect(i, item.thread);
#pragma unroll
    for (int g = 0; g < G; ++g) xt[g] = x_next[g] + bias_reg[g];
    is_active = active_next;
    if (item.valid && i + 1 < T) fetch(t + dt);  // prefetch: the loads overlap with this step's product
    float p[G], s[SAVED + 1];
    product(p, u, exchange.at(i + 1), item.lane);
    const State next = step(xt, p, state, bn_reg, s);
    if (is_active) state = next;
    const float out[1] = {state.h};
    if (i + 1 < T) exchange.send(i, out, item.unit0, item.lane);
    if (item.stores) {
      const wide after = (t + !reverse) * MH + offset;
      h[after] = state.h;
      if (HAS_C) c[after] = state.c;
      if (saved)
#pragma unroll
        for (int k = 0; k < SAVED; ++k) saved[(t * M + item.row) * SAVED * H + (wide)k * H + item.unit] = s[k];
    }
  }
  xp_cluster_sync();  // redundant, all sends were awaited: makes explicit that no block exits before its last message
}

// Values that the backward pass of one step reads.
struct StepInputs {
  float s[SAVED + 1], dy, dcs;
  State before, after;
  bool is_active;
};

// dh, dc (M,H): cotangent of the final state as input, of the initial state as output. dy, dcs (T,M,H): cotangents of h
// and c after each step, or null. dx, dp (T,M,G,H): gradients of x and of the recurrent products. dp is written only
// for the GRU; for the other cells it equals dx.
XP_KERNEL xp_backward(const float* __restrict__ weight, const float* __restrict__ saved, const float* __restrict__ h,
                      const float* __restrict__ c, const unsigned char* __restrict__ active,
                      const float* __restrict__ dy, const float* __restrict__ dcs, float* dh, float* dc, float* dx,
                      float* dp, int T, int M, int H, int reverse) {
  const Item item(M, H);
  Slice<RT, G * HP, KB> u;
  Exchange<G> exchange = {xp_shared() + u.SHARED, (u64*)(xp_shared() + u.SHARED + 2 * B * G * HP)};
  u.load(xp_shared(), item.thread, [&](int r, int k) {
    const int unit = item.unit0 + r;
    return unit < H && k % HP < H ? weight[((wide)(k / HP) * H + k % HP) * H + unit] : 0.f;
  });
  const wide first = reverse ? 0 : T - 1, dt = reverse ? 1 : -1;
  const wide MH = (wide)M * H, offset = (wide)item.row * H + item.unit;
  const auto fetch = [&](StepInputs& r, wide t) {
    const wide at = t * MH + offset, after = at + (reverse ? 0 : MH), before = at + (reverse ? MH : 0);
    if (dy) r.dy = dy[at];
    if (HAS_C && dcs) r.dcs = dcs[at];
    if (active) r.is_active = active[t * M + item.row];
    if (CELL == GRU) r.before.h = h[before];
    if (CELL == TANH || CELL == RELU) r.after.h = h[after];
    if (HAS_C) r.before.c = c[before];
#pragma unroll
    for (int k = 0; k < SAVED; ++k) r.s[k] = saved[(t * M + item.row) * SAVED * H + (wide)k * H + item.unit];
  };
  StepInputs now = {}, ahead = {};
  State d = {0.f, 0.f};
  now.is_active = ahead.is_active = true;
  if (item.valid) {
    d.h = dh[offset];
    if (HAS_C) d.c = dc[offset], ahead.after.c = c[(first + !reverse) * MH + offset];
    fetch(ahead, first);
  }
  exchange.open(item.thread);
  xp_cluster_sync();
#pragma unroll 1
  for (int i = 0; i < T; ++i) {
    const wide t = first + dt * i;
    exchange.expect(i, item.thread);
    now = ahead;
    if (HAS_C) ahead.after.c = ahead.before.c;
    if (item.valid && i + 1 < T) fetch(ahead, t + dt);
    float dxt[G], dpt[G], out[1];
    d.h += now.dy, d.c += now.dcs;
    const State unchanged = d;
    step_backward(d, now.s, now.before, now.after, dxt, dpt);
    if (!now.is_active) {  // a masked row passes its state, and so its cotangent, through unchanged
      d = unchanged;
#pragma unroll
      for (int g = 0; g < G; ++g) dxt[g] = dpt[g] = 0.f;
    }
    exchange.send(i, dpt, item.unit0, item.lane);
    if (item.stores)
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const wide at = ((t * M + item.row) * G + g) * H + item.unit;
        dx[at] = dxt[g];
        if (CELL == GRU) dp[at] = dpt[g];
      }
    exchange.wait(i);
    product(out, u, exchange.at(i), item.lane);
    d.h += out[0];
  }
  if (item.stores) {
    dh[offset] = d.h;
    if (HAS_C) dc[offset] = d.c;
  }
  xp_cluster_sync();
}
