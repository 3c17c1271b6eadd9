// What a printed kernel needs to be compiled by g++ and run on the host: the words of CUDA C++ it is written in.
#include <cmath>
#include <cstring>
#define __global__
static struct { unsigned x; } blockIdx, blockDim, threadIdx;
static inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// All threads of a launch, one after the other: forwards, or backwards, which a kernel must not notice.
template <class Kernel, class Arguments>
static void launch(Kernel kernel, const Arguments& a, unsigned grid, unsigned block, int backwards) {
  blockDim.x = block;
  const unsigned long long all = (unsigned long long)grid * block;
  for (unsigned long long k = 0; k < all; ++k) {
    const unsigned long long thread = backwards ? all - 1 - k : k;
    blockIdx.x = thread / block, threadIdx.x = thread % block;
    kernel(a);
  }
}
