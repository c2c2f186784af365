// Byte pair encoding: a word becomes symbols, and the pair of neighbours that was merged first in training is merged first here.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace sana {

struct Piece {
    std::int64_t id;
    std::size_t at;  // byte of the word where it begins
};

class Bpe {
  public:
    void add_token(std::string token, std::int64_t id) { vocabulary_.emplace(std::move(token), id); }
    // Merges are added in the order of training. False if one of the tokens is not in the vocabulary.
    bool add_merge(const std::string& first, const std::string& second);
    std::optional<std::int64_t> id(std::string_view token) const;
    void encode(std::string_view word, std::vector<Piece>& out) const;

    std::optional<std::int64_t> unknown;
    bool fuse_unknown = false;   // neighbouring unknown characters become one token
    bool byte_fallback = false;  // an unknown character becomes its bytes, <0xE7> and so on
    bool ignore_merges = false;  // a word that is a token needs no merges

  private:
    struct Symbol {
        std::int64_t id;
        std::size_t at, size;          // bytes of the word
        std::ptrdiff_t before, after;  // neighbours, -1 at an end
    };
    struct Merge {
        std::size_t rank;
        std::int64_t id;
    };

    std::vector<Symbol> symbols_of(std::string_view word) const;
    const Merge* merge_of(const std::vector<Symbol>& symbols, std::ptrdiff_t first) const;
    static std::uint64_t key(std::int64_t a, std::int64_t b) {
        return static_cast<std::uint64_t>(a) << 32 | static_cast<std::uint64_t>(b);
    }

    struct Hash {
        using is_transparent = void;
        std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
    };
    std::unordered_map<std::string, std::int64_t, Hash, std::equal_to<>> vocabulary_;
    std::unordered_map<std::uint64_t, Merge> merges_;
};

}  // namespace sana
