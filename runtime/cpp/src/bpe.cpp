#include "bpe.hpp"

#include <cstdio>
#include <queue>

#include "unicode.hpp"

namespace sana {

bool Bpe::add_merge(const std::string& first, const std::string& second) {
    const auto a = id(first), b = id(second), merged = id(first + second);
    if (!a || !b || !merged) return false;
    merges_.insert_or_assign(key(*a, *b), Merge{merges_.size(), *merged});
    return true;
}

std::optional<std::int64_t> Bpe::id(std::string_view token) const {
    const auto found = vocabulary_.find(token);
    return found == vocabulary_.end() ? std::nullopt : std::optional(found->second);
}

std::vector<Bpe::Symbol> Bpe::symbols_of(std::string_view word) const {
    std::vector<Symbol> out;
    const auto add = [&](std::int64_t symbol, std::size_t at, std::size_t size) {
        const auto place = static_cast<std::ptrdiff_t>(out.size());
        if (place > 0) out.back().after = place;
        out.push_back({symbol, at, size, place - 1, -1});
    };
    bool last_unknown = false;
    for (std::size_t at = 0; at < word.size();) {
        const std::size_t start = at;
        next_code_point(word, at);
        const std::string_view character = word.substr(start, at - start);
        if (const auto known = id(character)) {
            add(*known, start, character.size());
            last_unknown = false;
            continue;
        }
        if (byte_fallback) {
            std::vector<std::int64_t> bytes;
            for (const char c : character) {
                char name[8];
                std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned char>(c));
                if (const auto byte = id(name)) bytes.push_back(*byte);
            }
            if (bytes.size() == character.size()) {
                for (std::size_t i = 0; i < bytes.size(); ++i) add(bytes[i], start + i, 1);
                last_unknown = false;
                continue;
            }
        }
        if (!unknown) continue;
        if (fuse_unknown && last_unknown) {
            out.back().size += character.size();
        } else {
            add(*unknown, start, character.size());
        }
        last_unknown = true;
    }
    return out;
}

const Bpe::Merge* Bpe::merge_of(const std::vector<Symbol>& symbols, std::ptrdiff_t first) const {
    if (first < 0 || symbols[static_cast<std::size_t>(first)].after < 0) return nullptr;
    const Symbol& a = symbols[static_cast<std::size_t>(first)];
    const auto found = merges_.find(key(a.id, symbols[static_cast<std::size_t>(a.after)].id));
    return found == merges_.end() ? nullptr : &found->second;
}

void Bpe::encode(std::string_view word, std::vector<Piece>& out) const {
    if (ignore_merges) {
        if (const auto whole = id(word)) return out.push_back({*whole, 0});
    }
    std::vector<Symbol> symbols = symbols_of(word);
    using Candidate = std::pair<std::size_t, std::ptrdiff_t>;  // rank and place: the leftmost of equal ranks first
    struct Planned {
        Candidate at;
        std::int64_t id;
        bool operator>(const Planned& other) const { return at > other.at; }
    };
    std::priority_queue<Planned, std::vector<Planned>, std::greater<>> queue;
    const auto plan = [&](std::ptrdiff_t place) {
        if (const Merge* merge = merge_of(symbols, place)) queue.push({{merge->rank, place}, merge->id});
    };
    for (std::size_t i = 0; i < symbols.size(); ++i) plan(static_cast<std::ptrdiff_t>(i));
    while (!queue.empty()) {
        const Planned next = queue.top();
        queue.pop();
        Symbol& first = symbols[static_cast<std::size_t>(next.at.second)];
        // since it was planned, one of the two may have been merged with another
        const Merge* merge = first.size == 0 ? nullptr : merge_of(symbols, next.at.second);
        if (merge == nullptr || merge->id != next.id) continue;
        Symbol& second = symbols[static_cast<std::size_t>(first.after)];
        first.id = next.id;
        first.size += second.size;
        first.after = second.after;
        second.size = 0;
        if (first.after >= 0) symbols[static_cast<std::size_t>(first.after)].before = next.at.second;
        plan(first.before);
        plan(next.at.second);
    }
    for (const Symbol& symbol : symbols) {
        if (symbol.size > 0) out.push_back({symbol.id, symbol.at});
    }
}

}  // namespace sana
