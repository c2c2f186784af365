// Texts that were encoded lately: the empty negative prompt comes with almost every request. As runtime/text_cache.py.
#pragma once

#include <functional>
#include <list>
#include <utility>
#include <vector>

#include "prompt.hpp"
#include "session.hpp"

namespace sana {

// Each text is encoded alone: its embedding then depends on nothing but itself, and a hit gives the same bits as a miss.
class TextCache {
  public:
    using Encode = std::function<Tensor(const Tensor& ids, const Tensor& mask)>;  // (1, S) each -> (1, L, C)

    explicit TextCache(Encode encode) : encode_(std::move(encode)) {}

    Tensor embed(const std::vector<std::vector<Text>>& texts);  // k rows of B -> (k, B, L, C)

  private:
    const Tensor& embed(const Text& text);

    Encode encode_;
    std::list<std::pair<std::vector<std::int64_t>, Tensor>> kept_;  // the latest first
};

}  // namespace sana
