// The cells, for one unit of one row: the forward step and, below it, its backward step. The letters are those of
// xprnn/cells.
//
//   x[g]   input projection of gate g, biases included       p[g]   recurrent product of gate g
//   s[k]   values saved for backward                         bn     GRU: the bias inside the reset gate's product
//   before, after   the state (h, c) before and after the step
//
// `step_backward` reads from d the cotangent of the state after the step. It stores the gradients dx[g] of x[g] and
// dp[g] of p[g]. It leaves in d the cotangent of the state before the step, without the part that comes through the
// recurrent product; the kernel adds that part.

#define TANH 0
#define RELU 1
#define GRU 2
#define LSTM 3

struct State { float h, c; };

XP_DEV float sigmoid(float a) { return 1.f / (1.f + expf(-a)); }

#if CELL == TANH || CELL == RELU
#define G 1      // gates
#define SAVED 0  // backward needs only the output

XP_DEV State step(const float (&x)[G], const float (&p)[G], State, float, float*) {
  const float a = x[0] + p[0];
#if CELL == TANH
  return {tanhf(a), 0.f};
#else
  return {a <= 0.f ? 0.f : a, 0.f};  // written so that NaN propagates
#endif
}

XP_DEV void step_backward(State& d, const float*, State, State after, float (&dx)[G], float (&dp)[G]) {
#if CELL == TANH
  dp[0] = dx[0] = d.h * (1.f - after.h * after.h);
#else
  dp[0] = dx[0] = after.h > 0.f ? d.h : 0.f;
#endif
  d.h = 0.f;
}

#elif CELL == GRU
#define G 3
#define SAVED 4  // r, z, n, and the product that the reset gate r multiplies

XP_DEV State step(const float (&x)[G], const float (&p)[G], State before, float bn, float* s) {
  const float r = sigmoid(x[0] + p[0]), z = sigmoid(x[1] + p[1]), hn = p[2] + bn;
  const float n = tanhf(x[2] + r * hn);
  s[0] = r, s[1] = z, s[2] = n, s[3] = hn;
  return {n + z * (before.h - n), 0.f};
}

XP_DEV void step_backward(State& d, const float* s, State before, State, float (&dx)[G], float (&dp)[G]) {
  const float r = s[0], z = s[1], n = s[2], hn = s[3];
  const float dan = d.h * ((1.f - z) * (1.f - n * n));
  const float daz = d.h * ((before.h - n) * (z * (1.f - z)));
  const float dar = dan * (hn * (r * (1.f - r)));
  dx[0] = dp[0] = dar, dx[1] = dp[1] = daz;
  dx[2] = dan, dp[2] = dan * r;
  d.h = d.h * z;
}

#elif CELL == LSTM
#define G 4
#define SAVED 4  // i, f, g, o

XP_DEV State step(const float (&x)[G], const float (&p)[G], State before, float, float* s) {
  const float i = sigmoid(x[0] + p[0]), f = sigmoid(x[1] + p[1]), g = tanhf(x[2] + p[2]), o = sigmoid(x[3] + p[3]);
  s[0] = i, s[1] = f, s[2] = g, s[3] = o;
  const float c = f * before.c + i * g;
  return {o * tanhf(c), c};
}

XP_DEV void step_backward(State& d, const float* s, State before, State after, float (&dx)[G], float (&dp)[G]) {
  const float i = s[0], f = s[1], g = s[2], o = s[3], tc = tanhf(after.c);
  dx[3] = d.h * (tc * (o * (1.f - o)));
  const float dc = d.c + d.h * (o * (1.f - tc * tc));
  dx[2] = dc * (i * (1.f - g * g));
  dx[0] = dc * (g * (i * (1.f - i)));
  dx[1] = dc * (before.c * (f * (1.f - f)));
  for (int k = 0; k < G; ++k) dp[k] = dx[k];
  d = {0.f, dc * f};
}
#endif
