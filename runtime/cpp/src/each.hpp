// Several pieces of work at the same time, in threads, and all of them over before anybody goes on.
#pragma once

#include <cstddef>
#include <functional>

namespace sana {

// work(i) for each i below `count`, by the calling thread and at most `threads` - 1 others. Throws the first error in the order of i;
// work that nobody has begun by then is left.
void each(std::size_t count, unsigned threads, const std::function<void(std::size_t)>& work);

// For work that waits for nothing: a picture's stripes, of which there are as many at 1024 px.
unsigned picture_threads();

}  // namespace sana
