#include "text_cache.hpp"

namespace sana {
namespace {

constexpr std::size_t kTextsKept = 16;  // one of Gemma-2-2B is 2.8 MB

Tensor row_of(const std::vector<std::int64_t>& values) { return {{1, static_cast<std::int64_t>(values.size())}, values}; }

}  // namespace

const Tensor& TextCache::embed(const Text& text) {
    std::vector<std::int64_t> key = text.ids;
    key.insert(key.end(), text.mask.begin(), text.mask.end());
    for (auto each = kept_.begin(); each != kept_.end(); ++each) {
        if (each->first == key) {
            kept_.splice(kept_.begin(), kept_, each);
            return each->second;
        }
    }
    kept_.emplace_front(std::move(key), encode_(row_of(text.ids), row_of(text.mask)));
    if (kept_.size() > kTextsKept) kept_.pop_back();
    return kept_.front().second;
}

Tensor TextCache::embed(const std::vector<std::vector<Text>>& texts) {
    Tensor out{{static_cast<std::int64_t>(texts.size()), static_cast<std::int64_t>(texts[0].size())}, std::vector<float>()};
    for (const std::vector<Text>& row : texts) {
        for (const Text& text : row) {
            const Tensor& one = embed(text);
            if (out.shape.size() == 2) out.shape.insert(out.shape.end(), one.shape.begin() + 1, one.shape.end());
            out.floats().insert(out.floats().end(), one.floats().begin(), one.floats().end());
        }
    }
    return out;
}

}  // namespace sana
