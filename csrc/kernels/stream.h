// A copy for another core to read.
#pragma once

#include <cstddef>

namespace fastddp {

// As memcpy, past the caches where the processor can do that. What lies modified in one core's
// cache comes to another slowly if the two share none: at 2 GB/s on an EPYC, where the way through
// memory is six times as fast. All of it is visible to whoever sees a store that follows. `to` has
// to be aligned to 64 bytes.
void stream_copy(void* to, const void* from, std::size_t bytes);

}  // namespace fastddp
