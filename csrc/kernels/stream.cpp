#include "kernels/stream.h"

#include <cstring>

// ThreadSanitizer does not see these stores.
#if defined(__SSE2__) && !defined(__SANITIZE_THREAD__)
#include <emmintrin.h>
#define FASTDDP_STREAMS
#endif

namespace fastddp {

void stream_copy(void* to, const void* from, std::size_t bytes) {
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
#ifdef FASTDDP_STREAMS
  constexpr std::size_t kLine = 64;
  for (; bytes >= kLine; bytes -= kLine, out += kLine, in += kLine) {
    for (std::size_t i = 0; i < kLine; i += sizeof(__m128i)) {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), part);
    }
  }
  _mm_sfence();  // else a later release store could overtake these stores
#endif
  if (bytes > 0) std::memcpy(out, in, bytes);
}

}  // namespace fastddp
