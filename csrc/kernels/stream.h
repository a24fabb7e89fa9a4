// A copy for another core to read.
#pragma once

#include <cstddef>

namespace fastddp {

// Like memcpy, but bypasses the caches where the processor can do that. A core reads data that is
// modified in the cache of another core slowly if the two share no cache (2 GB/s on an EPYC): an
// all-reduce of ordinary tensors took a quarter of the time when the chunks went through memory
// instead. A thread that sees a store made after this call sees the whole copy. `to` has to be
// aligned to 64 bytes.
void stream_copy(void* to, const void* from, std::size_t bytes);

}  // namespace fastddp
