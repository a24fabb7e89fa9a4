// A copy for another core to read.
#pragma once

#include <cstddef>

namespace fastddp {

// As memcpy, past the caches where the processor can do that. What lies modified in one core's
// cache comes slowly to another that shares none with it (2 GB/s on an EPYC): an all-reduce of
// ordinary tensors took a quarter of the time when their chunks went through memory instead.
// Whoever sees a store that follows sees all of it. `to` has to be aligned to 64 bytes.
void stream_copy(void* to, const void* from, std::size_t bytes);

}  // namespace fastddp
