// The CUDA C++ names that generated kernels use, defined for g++, so that the kernels run on the host.
#include <cmath>
#include <cstring>
#define __global__
static struct { unsigned x; } blockIdx, blockDim, threadIdx;
static inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// Run all threads of a launch one after the other, in ascending or descending order. Results must not depend on it.
template <class Kernel, class Arguments>
static void launch(Kernel kernel, const Arguments& a, unsigned grid, unsigned block, int descending) {
  blockDim.x = block;
  const unsigned long long count = (unsigned long long)grid * block;
  for (unsigned long long k = 0; k < count; ++k) {
    const unsigned long long thread = descending ? count - 1 - k : k;
    blockIdx.x = thread / block, threadIdx.x = thread % block;
    kernel(a);
  }
}
