// Device functions of the persistent kernels: sm_90 instructions as inline PTX. No header is needed.
//
// tests/support/cuda/persistent_emulator.h defines the same names on a CPU, so that the tests run the unchanged kernels
// there.

#define XP_DEV [[maybe_unused]] static __device__ __forceinline__
#define XP_MEMBER __device__ __forceinline__
#define XP_KERNEL extern "C" __global__ void __cluster_dims__(CL, 1, 1) __launch_bounds__(NT, 1)

typedef unsigned int u32;
typedef unsigned long long u64;

extern __shared__ float4 xp_memory[];

XP_DEV float* xp_shared() { return (float*)xp_memory; }
XP_DEV int xp_thread() { return (int)threadIdx.x; }
XP_DEV int xp_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return (int)r; }
XP_DEV int xp_cluster() { return (int)blockIdx.x / CL; }
XP_DEV u32 xp_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Return v, but hide its value from the compiler's optimizer.
XP_DEV int xp_opaque(int v) { asm volatile("" : "+r"(v)); return v; }

// Synchronize all threads of the block, and of the cluster. xp_cluster_sync flushes memory: keep it out of time loops.
XP_DEV void xp_block_sync() { __syncthreads(); }
XP_DEV void xp_cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A barrier (mbarrier) in shared memory. A phase completes after one arrival and the number of bytes that it announced.
XP_DEV void xp_barrier_init(u64* bar) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n fence.mbarrier_init.release.cluster;"
               :: "r"(xp_address(bar)) : "memory");
}
XP_DEV void xp_barrier_expect(u64* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(xp_address(bar)), "r"(bytes) : "memory");
}
// Wait with acquire semantics at block scope, which suffices for shared memory. CUTLASS does the same for messages from
// other blocks. `.acquire.cluster` would add a CCTL.IVALL to each step, which invalidates the L1 cache.
XP_DEV void xp_barrier_wait(u64* bar, int parity) {
  asm volatile("{\n .reg .pred p;\n"
               "again_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
               " @!p bra again_%=;\n}" :: "r"(xp_address(bar)), "r"(parity) : "memory");
}

// Store four floats at the same shared-memory offset of another block of the cluster; that block's barrier counts them.
XP_DEV void xp_send4(float* here, const float (&v)[4], u64* bar, int rank) {
  u32 data_address, bar_address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(data_address) : "r"(xp_address(here)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(bar_address) : "r"(xp_address(bar)), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               :: "r"(data_address), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(bar_address) : "memory");
}

// Shuffles between the lanes of a warp. All 32 lanes must call them.
XP_DEV float xp_swap(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
XP_DEV float xp_fetch(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

// Read or write V consecutive floats in shared memory, aligned to 4 V bytes.
XP_DEV void xp_read(float (&v)[4], const float* p) { *(float4*)v = *(const float4*)p; }
XP_DEV void xp_read(float (&v)[2], const float* p) { *(float2*)v = *(const float2*)p; }
XP_DEV void xp_write(float* p, const float (&v)[4]) { *(float4*)p = *(const float4*)v; }
