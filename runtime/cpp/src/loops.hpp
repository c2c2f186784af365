// Whole loops as CUDA graphs: one launch a picture instead of hundreds a step. As runtime/graphs.py.
//
// A graph holds addresses and shapes, so its key names all of them. CUDA refuses a graph that copies memory which was freed, even where
// other memory has that address since: all are forgotten when memory is freed. A picture of a size that was not drawn lately is drawn
// launch by launch, which also lets engines settle on the shape; the next one of that size is captured, and launched from then on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <utility>
#include <vector>

#include "cuda.hpp"

namespace sana {

class Loops {
  public:
    using Key = std::vector<std::int64_t>;

    explicit Loops(Cuda& cuda) : cuda_(cuda), num_freed_(cuda.num_freed()) {}
    ~Loops() { clear(); }
    Loops(const Loops&) = delete;

    // The graph of `key`, captured if the key is known and has none yet; nullptr if the key is new: queue the work as it is. None may
    // be running.
    void* get(const Key& key, const std::function<void()>& queue);
    void clear() noexcept;  // none may be running

  private:
    Cuda& cuda_;
    std::list<std::pair<Key, void*>> kept_;  // the latest first
    std::size_t num_freed_;                  // allocations, when they were captured
};

}  // namespace sana
