// A whole sequence in one launch: the recurrent weights stay on the chip, only states travel.
//
// The rows of a batch know nothing of each other, so each cluster of CL blocks takes B rows for all T steps, and clusters
// never talk. Inside a cluster the HP hidden units (H of them in use) are split over blocks, then over warps:
//
//                 all T steps of rows m0 .. m0 + B - 1                            one warp
//      block 0            block 1           ...   block CL-1              RT units, G gates of each:
//   +--------------+   +--------------+        +--------------+        ROWS rows of the weight, K numbers long
//   | units        |   | units        |        | units        |         lane 0   1   2  ...  31   0   1  ...
//   | 0 .. UPB-1   |   | UPB .. 2UPB-1|        |   .. HP-1    |        +---+---+---+---+---+---+---+---+
//   | warp 0: RT   |   | warp 0: RT   |        |              |        | V | V | V |       | V | V |     | row 0
//   | warp 1: RT   |   | warp 1: RT   |        |              |        +---+---+---+---+---+---+---+---+
//   |   ...        |   |   ...        |        |              |        |   |   |   |       |   |   |     | row 1
//   +------+-------+   +------+-------+        +------+-------+           chunk 0: 32 V      chunk 1: 32 V
//          |   every block has all the numbers        |                 the first chunks in registers, the rest in
//          +---- of its rows: it sends its own -------+                 shared memory
//                units to all blocks (and itself)
//
// The numbers that travel are h (forward, K = HP) and the gates' adjoints (backward, K = G HP). A step:
//
//   wait for all K numbers of the B rows  ->  each lane multiplies its columns  ->  the lanes' sums are added up so that
//   each (row, unit) ends in one lane with all its gates  ->  the cell  ->  results to global memory, four units at a
//   time to every block
//
// Sums take halving steps: in each a lane gives away one half of what it holds and gets the other half's summands. With
// Q = B RT items, lane l ends with item l / (32 / Q) = row * RT + unit; the first lane of each group stores it.
//
// The exchange has two buffers and two barriers. Exchange e fills buffer e & 1 of every block with exactly 4 B K bytes;
// its barrier completes when they are there (thread 0 announces them). A block writes exchange e into a peer's buffer only
// when it has received all of e - 1, which that peer's warps sent after they had read e - 2, the buffer's last content: no
// other synchronisation is needed in the loop. A cluster of one block uses its own shared memory and a block barrier.
//
// To be defined: CELL, HP, CL, NT (threads), B, KF and KB (chunks in registers, forward and backward).
// Arrays are C-ordered: x (T,M,G,H), saved (T,M,SAVED,H), states h and c (T+1,M,H) with the initial state before the first
// step (at T where the walk is reversed), active (T,M) bytes or null for all, weight (G,H,H).

#define UPB (HP / CL)    // units of a block
#define RT (UPB / (NT / 32))  // units of a warp
#define Q (B * RT)       // (row, unit) items of a warp
#define GROUP (32 / Q)   // lanes that end with the same item

static_assert(RT % 4 == 0 && RT * (NT / 32) * CL == HP, "whole groups of four units for each warp");
static_assert(Q <= 32 && 32 % Q == 0, "an item for each lane at most");

typedef long long wide;

// ROWS rows of a matrix, K long, spread over the lanes of a warp in chunks of 32 V columns, KR of them in registers.
template <int ROWS, int K, int KR>
struct Slice {
  static constexpr int V = K % 128 ? 2 : 4, CHUNKS = K / (32 * V), SHARED = (CHUNKS - KR) * ROWS * V * NT;
  static_assert(K % 64 == 0 && KR >= 1 && KR <= CHUNKS, "whole chunks");
  float held[KR][ROWS][V];
  float* rest;

  template <class At>
  XP_MEMBER void load(float* room, int thread, At at) {
    rest = room + thread * V;
#pragma unroll
    for (int k = 0; k < KR; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int column = xp_opaque((k * 32 + thread % 32) * V + i);  // else addresses take the registers
#pragma unroll
        for (int r = 0; r < ROWS; ++r) held[k][r][i] = at(r, column);
      }
#pragma unroll 1
    for (int k = KR; k < CHUNKS; ++k)
#pragma unroll 1
      for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < V; ++i) rest[((k - KR) * ROWS + r) * V * NT + i] = at(r, (k * 32 + thread % 32) * V + i);
  }

  // sum[r][b]: this lane's share of row r times vector b of in (B, K)
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
      for (int r = 0; r < ROWS; ++r) add(sum[r], held[k][r], v);
    }
#pragma unroll 1  // a chunk at a time: the registers are taken
    for (int k = KR; k < CHUNKS; ++k) {
      float v[B][V];
#pragma unroll
      for (int b = 0; b < B; ++b) xp_read(v[b], in + b * K + (k * 32 + lane) * V);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float w[V];
        xp_read(w, rest + ((k - KR) * ROWS + r) * V * NT);
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

// The sum over all lanes of v[lane / GROUP].
XP_DEV float add_up(float (&v)[Q], int lane) {
#pragma unroll
  for (int s = 0; s < 5; ++s) {
    const int mask = 16 >> s, half = Q >> (s + 1);
    const bool upper = lane & mask;
    if (half == 0) v[0] += xp_swap(v[0], mask);
#pragma unroll
    for (int j = 0; j < Q / 2; ++j)
      if (j < half) {
        const float given = upper ? v[j] : v[j + half], kept = upper ? v[j + half] : v[j];
        v[j] = kept + xp_swap(given, mask);
      }
  }
  return v[0];
}

// For each of GATES: the product of its RT rows with the B vectors at `in`, as this lane's item.
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
    out[g] = add_up(v, lane);
  }
}

// Two buffers (B, PARTS, HP) in shared memory that every block of the cluster fills together.
template <int PARTS>
struct Exchange {
  static constexpr int FLOATS = B * PARTS * HP;
  float* buffer;
  u64* bar;

  XP_MEMBER float* at(int e) const { return buffer + (e & 1) * FLOATS; }

  XP_MEMBER void open(int thread) {
    if (CL > 1 && thread == 0) xp_barrier_init(bar), xp_barrier_init(bar + 1);
  }

  // Once for each exchange by one thread of each block, after it has waited for the exchange before.
  XP_MEMBER void expect(int e, int thread) const {
    if (CL > 1 && thread == 0) xp_barrier_expect(bar + (e & 1), 4 * FLOATS);
  }

  // All lanes: this lane's item of each part, to every block. unit0 is the warp's first unit.
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

// What a lane looks after: one unit of one row.
struct Item {
  int lane, thread, unit0, unit, row0, row;
  bool real, mine;  // inside the arrays; and stored by this lane

  XP_MEMBER Item(int M, int H) {
    thread = xp_thread(), lane = thread % 32;
    unit0 = xp_rank() * UPB + thread / 32 * RT;
    unit = unit0 + lane / GROUP % RT;
    row0 = xp_cluster() * B;
    row = row0 + lane / GROUP / RT;
    real = row < M && unit < H;
    mine = real && lane % GROUP == 0;
  }
};

#if CELL == LSTM
#define HAS_C 1
#else
#define HAS_C 0
#endif

// bias (G,H): what is added to x; bn (H): the GRU's bias that r multiplies; null for none.
XP_KERNEL xp_forward(const float* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ bn,
                     const float* __restrict__ x, const unsigned char* __restrict__ active, float* h, float* c,
                     float* saved, int T, int M, int H, int reverse) {
  const Item me(M, H);
  Slice<G * RT, HP, KF> u;
  Exchange<1> exchange = {xp_shared() + u.SHARED, (u64*)(xp_shared() + u.SHARED + 2 * B * HP)};
  u.load(xp_shared(), me.thread, [&](int r, int k) {
    const int unit = me.unit0 + r % RT;
    return unit < H && k < H ? weight[((wide)(r / RT) * H + unit) * H + k] : 0.f;
  });
  const wide first = reverse ? T - 1 : 0, way = reverse ? -1 : 1, before = reverse ? T : 0;
  const wide MH = (wide)M * H, place = (wide)me.row * H + me.unit;
  for (int i = me.thread; i < B * HP; i += NT) {
    const int row = me.row0 + i / HP, k = i % HP;
    exchange.at(1)[i] = row < M && k < H ? h[before * MH + (wide)row * H + k] : 0.f;
  }
  State state = {0.f, 0.f};
  float added[G] = {}, inner = 0.f, xt[G], ahead[G] = {};
  bool on, on_ahead = true;
  const auto fetch = [&](wide t) {
#pragma unroll
    for (int g = 0; g < G; ++g) ahead[g] = x[((t * M + me.row) * G + g) * H + me.unit];
    if (active) on_ahead = active[t * M + me.row];
  };
  if (me.real) {
    state.h = h[before * MH + place];
    if (HAS_C) state.c = c[before * MH + place];
    if (bias)
      for (int g = 0; g < G; ++g) added[g] = bias[g * H + me.unit];
    if (CELL == GRU && bn) inner = bn[me.unit];
    fetch(first);
  }
  exchange.open(me.thread);
  xp_cluster_sync();
#pragma unroll 1
  for (int i = 0; i < T; ++i) {
    const wide t = first + way * i;
    if (i > 0) exchange.wait(i - 1);
    if (i + 1 < T) exchange.expect(i, me.thread);
#pragma unroll
    for (int g = 0; g < G; ++g) xt[g] = ahead[g] + added[g];
    on = on_ahead;
    if (me.real && i + 1 < T) fetch(t + way);  // on its way while this step multiplies
    float p[G], s[SAVED + 1];
    product(p, u, exchange.at(i + 1), me.lane);
    const State next = step(xt, p, state, inner, s);
    if (on) state = next;
    const float out[1] = {state.h};
    if (i + 1 < T) exchange.send(i, out, me.unit0, me.lane);
    if (me.mine) {
      const wide after = (t + !reverse) * MH + place;
      h[after] = state.h;
      if (HAS_C) c[after] = state.c;
      if (saved)
#pragma unroll
        for (int k = 0; k < SAVED; ++k) saved[(t * M + me.row) * SAVED * H + (wide)k * H + me.unit] = s[k];
    }
  }
  xp_cluster_sync();  // all messages were awaited: this only makes it plain that none finds its block gone
}

// What the adjoint of one step reads.
struct Record {
  float s[SAVED + 1], dy, dcs;
  State before, after;
  bool on;
};

// dh, dc (M,H): in, the adjoint of the final state; out, that of the initial one. dy, dcs (T,M,H): adjoints of the states
// after each step, or null. dx, dp (T,M,G,H): those of x and of the products, dp only for the GRU, where they differ.
XP_KERNEL xp_backward(const float* __restrict__ weight, const float* __restrict__ saved, const float* __restrict__ h,
                      const float* __restrict__ c, const unsigned char* __restrict__ active,
                      const float* __restrict__ dy, const float* __restrict__ dcs, float* dh, float* dc, float* dx,
                      float* dp, int T, int M, int H, int reverse) {
  const Item me(M, H);
  Slice<RT, G * HP, KB> u;
  Exchange<G> exchange = {xp_shared() + u.SHARED, (u64*)(xp_shared() + u.SHARED + 2 * B * G * HP)};
  u.load(xp_shared(), me.thread, [&](int r, int k) {
    const int unit = me.unit0 + r;
    return unit < H && k % HP < H ? weight[((wide)(k / HP) * H + k % HP) * H + unit] : 0.f;
  });
  const wide first = reverse ? 0 : T - 1, way = reverse ? 1 : -1;
  const wide MH = (wide)M * H, place = (wide)me.row * H + me.unit;
  const auto fetch = [&](Record& r, wide t) {
    const wide at = t * MH + place, late = at + (reverse ? 0 : MH), early = at + (reverse ? MH : 0);
    if (dy) r.dy = dy[at];
    if (HAS_C && dcs) r.dcs = dcs[at];
    if (active) r.on = active[t * M + me.row];
    if (CELL == GRU) r.before.h = h[early];
    if (CELL == TANH || CELL == RELU) r.after.h = h[late];
    if (HAS_C) r.before.c = c[early];
#pragma unroll
    for (int k = 0; k < SAVED; ++k) r.s[k] = saved[(t * M + me.row) * SAVED * H + (wide)k * H + me.unit];
  };
  Record now = {}, ahead = {};
  State d = {0.f, 0.f};
  now.on = ahead.on = true;
  if (me.real) {
    d.h = dh[place];
    if (HAS_C) d.c = dc[place], ahead.after.c = c[(first + !reverse) * MH + place];
    fetch(ahead, first);
  }
  exchange.open(me.thread);
  xp_cluster_sync();
#pragma unroll 1
  for (int i = 0; i < T; ++i) {
    const wide t = first + way * i;
    exchange.expect(i, me.thread);
    now = ahead;
    if (HAS_C) ahead.after.c = ahead.before.c;
    if (me.real && i + 1 < T) fetch(ahead, t + way);
    float da[G], dq[G], out[1];
    d.h += now.dy, d.c += now.dcs;
    const State whole = d;
    back(d, now.s, now.before, now.after, da, dq);
    if (!now.on) {  // the row sat this step out: its state was handed on as it was
      d = whole;
#pragma unroll
      for (int g = 0; g < G; ++g) da[g] = dq[g] = 0.f;
    }
    exchange.send(i, dq, me.unit0, me.lane);
    if (me.mine)
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const wide at = ((t * M + me.row) * G + g) * H + me.unit;
        dx[at] = da[g];
        if (CELL == GRU) dp[at] = dq[g];
      }
    exchange.wait(i);
    product(out, u, exchange.at(i), me.lane);
    d.h += out[0];
  }
  if (me.mine) {
    dh[place] = d.h;
    if (HAS_C) dc[place] = d.c;
  }
  xp_cluster_sync();
}
