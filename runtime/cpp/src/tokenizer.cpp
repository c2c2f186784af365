#include "tokenizer.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "bpe.hpp"
#include "failure.hpp"
#include "json.hpp"
#include "python_text.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

constexpr std::size_t kMaxBytes = 256 << 20;      // Gemma-2's is 34 MB
constexpr std::size_t kMaxNormalized = 16 << 20;  // some Replace in a row can double a text each

// What ByteLevel writes for each byte: printable ASCII and Latin-1 as they are, the others as characters from U+0100 on.
std::string byte_character(unsigned char byte) {
    const auto plain = [](unsigned b) { return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE; };
    char32_t c = byte;
    if (!plain(byte)) {
        c = 0x100;
        for (unsigned b = 0; b < byte; ++b) c += !plain(b);
    }
    std::string out;
    append(out, c);
    return out;
}

bool is_regex_space(char32_t c) { return is_space(c) && !(c >= 0x1C && c <= 0x1F); }  // \s knows no separators of records

enum class Class { kLetter, kNumber, kSpace, kOther };

Class class_of(char32_t c) {
    return is_letter(c) ? Class::kLetter : is_number(c) ? Class::kNumber : is_regex_space(c) ? Class::kSpace : Class::kOther;
}

// GPT-2's split: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
std::size_t end_of_word(const std::u32string& text, std::size_t at) {
    static const std::u32string_view kContractions[] = {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"};
    for (const std::u32string_view each : kContractions) {
        if (std::u32string_view(text).substr(at).starts_with(each)) return at + each.size();
    }
    const std::size_t first = text[at] == U' ' && at + 1 < text.size() ? at + 1 : at;
    const auto run = [&](std::size_t from) {
        std::size_t end = from;
        while (end < text.size() && class_of(text[end]) == class_of(text[from])) ++end;
        return end;
    };
    if (class_of(text[first]) != Class::kSpace) return run(first);
    const std::size_t end = run(at);
    return end == text.size() || end == at + 1 ? end : end - 1;  // the last space belongs to the word behind
}

}  // namespace

struct Tokenizer::Parts {
    // A part of the text on its way to the model; `origin` has the byte of the text that each byte came from.
    struct Segment {
        std::string text;
        std::vector<std::size_t> origin;
    };

    struct AddedToken {
        std::string content;
        std::int64_t id;
    };

    struct Replacement {
        std::string from, to;
    };

    std::string path;
    Bpe model;
    std::vector<AddedToken> raw_tokens, normalized_tokens;
    std::vector<Replacement> replacements;
    std::vector<std::string> splits;  // strings that end a word
    bool byte_level = false, byte_level_regex = false;
    std::vector<std::int64_t> prefix;

    [[noreturn]] void refuse(const std::string& why) const {
        throw Failure(ErrorKind::kCheckpoint,
                      path + ": not a tokenizer (" + why + "); expected a tokenizer.json of the tokenizers library.");
    }
    [[noreturn]] void unknown(const std::string& what) const {
        throw Failure(ErrorKind::kCheckpoint, path + ": got " + what +
                                                  ", which the C++ runtime does not know; expected the parts of Gemma's tokenizer. "
                                                  "Draw with the Python runtime.");
    }

    const std::string& string_at(const Json& json, const char* key) const {
        const Json* found = json.find(key);
        const auto* text = found ? found->get<std::string>() : nullptr;
        if (text == nullptr) refuse(std::string("no string ") + repr(key));
        return *text;
    }
    bool flag_at(const Json& json, const char* key, bool otherwise) const {
        const Json* found = json.find(key);
        const auto* flag = found ? found->get<bool>() : nullptr;
        return flag ? *flag : otherwise;
    }
    const JsonArray& array_at(const Json& json, const char* key) const {
        const Json* found = json.find(key);
        const auto* array = found ? found->get<JsonArray>() : nullptr;
        if (array == nullptr) refuse(std::string("no list ") + repr(key));
        return *array;
    }
    static bool is_set(const Json& json, const char* key) {
        const Json* found = json.find(key);
        return found != nullptr && !found->get<std::nullptr_t>();
    }
    std::int64_t integer_at(const Json& json, const char* key) const {
        const Json* found = json.find(key);
        const auto* number = found ? found->get<std::int64_t>() : nullptr;
        if (number == nullptr || *number < 0 || *number > INT32_MAX) refuse(std::string("no token's number ") + repr(key));
        return *number;
    }
    const std::string& pattern_string(const Json& json, const char* of) const {
        const Json* pattern = json.find("pattern");
        const Json* text = pattern ? pattern->find("String") : nullptr;
        const auto* found = text ? text->get<std::string>() : nullptr;
        if (found == nullptr || found->empty()) unknown(std::string("a pattern of ") + of + " that is no string");
        return *found;
    }

    void read_normalizer(const Json& json) {
        const std::string& type = string_at(json, "type");
        if (type == "Sequence") {
            for (const Json& each : array_at(json, "normalizers")) read_normalizer(each);
        } else if (type == "Replace") {
            replacements.push_back({pattern_string(json, "Replace"), string_at(json, "content")});
        } else {
            unknown("the normalizer " + repr(type));
        }
    }

    void read_pre_tokenizer(const Json& json) {
        const std::string& type = string_at(json, "type");
        if (byte_level) unknown("a pre-tokenizer behind ByteLevel");  // which would see other characters
        if (type == "Sequence") {
            for (const Json& each : array_at(json, "pretokenizers")) read_pre_tokenizer(each);
        } else if (type == "ByteLevel") {
            byte_level = true;
            byte_level_regex = flag_at(json, "use_regex", true);
            if (flag_at(json, "add_prefix_space", true)) unknown("ByteLevel with add_prefix_space");
        } else if (type == "Split") {
            if (string_at(json, "behavior") != "MergedWithPrevious" || flag_at(json, "invert", false))
                unknown("Split other than MergedWithPrevious");
            splits.push_back(pattern_string(json, "Split"));
        } else {
            unknown("the pre-tokenizer " + repr(type));
        }
    }

    void read_post_processor(const Json& json) {
        const std::string& type = string_at(json, "type");
        if (type == "Sequence") {
            for (const Json& each : array_at(json, "processors")) read_post_processor(each);
            return;
        }
        if (type == "ByteLevel") return;  // changes where tokens are said to be, not which they are
        if (type != "TemplateProcessing") unknown("the post-processor " + repr(type));
        const Json* special = json.find("special_tokens");
        bool behind = false;
        for (const Json& each : array_at(json, "single")) {
            if (each.find("Sequence")) {
                behind = true;
                continue;
            }
            const Json* token = each.find("SpecialToken");
            if (token == nullptr || special == nullptr) refuse("a template of neither tokens nor text");
            if (behind) unknown("a template that adds tokens behind the text");
            const Json* entry = special->find(string_at(*token, "id"));
            if (entry == nullptr) refuse("a template with a token that is not described");
            for (const Json& id : array_at(*entry, "ids")) prefix.push_back(id.get<std::int64_t>() ? *id.get<std::int64_t>() : -1);
        }
    }

    void read_model(const Json& json) {
        const Json* named = json.find("type");
        if (named && named->get<std::string>() && *named->get<std::string>() != "BPE")
            unknown("the model " + repr(*named->get<std::string>()));
        for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
            if (is_set(json, key) && !(json.find(key)->get<std::string>() && json.find(key)->get<std::string>()->empty()))
                unknown(std::string("a BPE model with ") + key);
        }
        const Json* vocabulary = json.find("vocab");
        const auto* tokens = vocabulary ? vocabulary->get<JsonObject>() : nullptr;
        if (tokens == nullptr) refuse("no vocabulary");
        for (const auto& [token, id] : *tokens) {
            const auto* number = id.get<std::int64_t>();
            if (number == nullptr || *number < 0 || *number > INT32_MAX) refuse("a token without a number");
            model.add_token(token, *number);
        }
        for (const Json& each : array_at(json, "merges")) {
            std::string first, second;
            if (const auto* text = each.get<std::string>()) {  // older files: two words with a space between
                const std::size_t space = text->find(' ');
                first = text->substr(0, space);
                second = space == text->npos ? "" : text->substr(space + 1);
            } else if (const auto* pair = each.get<JsonArray>();
                       pair && pair->size() == 2 && (*pair)[0].get<std::string>() && (*pair)[1].get<std::string>()) {
                first = *(*pair)[0].get<std::string>();
                second = *(*pair)[1].get<std::string>();
            }
            if (!model.add_merge(first, second))
                refuse("a merge of tokens that are not there: " + repr(first) + " and " + repr(second));
        }
        if (is_set(json, "unk_token")) model.unknown = model.id(string_at(json, "unk_token"));
        model.fuse_unknown = flag_at(json, "fuse_unk", false);
        model.byte_fallback = flag_at(json, "byte_fallback", false);
        model.ignore_merges = flag_at(json, "ignore_merges", false);
    }

    void read_added(const Json& json) {
        const std::string& content = string_at(json, "content");
        for (const char* key : {"single_word", "lstrip", "rstrip"}) {
            if (flag_at(json, key, false)) unknown("the added token " + repr(content) + " with " + key);
        }
        const std::int64_t id = integer_at(json, "id");
        model.add_token(content, id);  // no effect where the vocabulary has it
        if (content.empty()) return;
        if (flag_at(json, "normalized", true)) {
            normalized_tokens.push_back({normalized({content, {}}, false).text, id});
        } else {
            raw_tokens.push_back({content, id});
        }
    }

    Segment normalized(Segment segment, bool track = true) const {
        for (const Replacement& each : replacements) {
            Segment out;
            for (std::size_t at = 0; at < segment.text.size();) {
                const bool hit = segment.text.compare(at, each.from.size(), each.from) == 0;
                const std::string_view put = hit ? std::string_view(each.to) : std::string_view(segment.text).substr(at, 1);
                out.text += put;
                if (track) out.origin.insert(out.origin.end(), put.size(), segment.origin[at]);
                at += hit ? each.from.size() : 1;
                if (out.text.size() > kMaxNormalized) unknown("a normalizer that makes a text of more than 16 MB");
            }
            segment = std::move(out);
        }
        return segment;
    }

    // Calls `text` with what lies between added tokens, and `token` with those: the leftmost, of several the longest.
    template <class OnText, class OnToken>
    static void cut(const Segment& segment, const std::vector<AddedToken>& tokens, OnText on_text, OnToken on_token) {
        std::size_t from = 0;
        const auto flush = [&](std::size_t to) {
            if (to == from) return;
            const auto begin = segment.origin.begin();
            on_text(
                Segment{segment.text.substr(from, to - from), {begin + static_cast<long>(from), begin + static_cast<long>(to)}});
        };
        for (std::size_t at = 0; at < segment.text.size();) {
            const AddedToken* best = nullptr;
            for (const AddedToken& each : tokens) {
                if (segment.text.compare(at, each.content.size(), each.content) == 0 &&
                    (best == nullptr || each.content.size() > best->content.size()))
                    best = &each;
            }
            if (best == nullptr) {
                ++at;
                continue;
            }
            flush(at);
            on_token(Token{best->id, segment.origin[at]});
            at += best->content.size();
            from = at;
        }
        flush(segment.text.size());
    }

    void encode_word(const Segment& word, std::vector<Token>& out) const {
        std::vector<Piece> pieces;
        model.encode(word.text, pieces);
        for (const Piece& piece : pieces) out.push_back({piece.id, word.origin[piece.at]});
    }

    void encode_bytes(const Segment& word, std::vector<Token>& out) const {
        Segment bytes;
        for (std::size_t i = 0; i < word.text.size(); ++i) {
            const std::string character = byte_character(static_cast<unsigned char>(word.text[i]));
            bytes.text += character;
            bytes.origin.insert(bytes.origin.end(), character.size(), word.origin[i]);
        }
        encode_word(bytes, out);
    }

    static Segment part(const Segment& segment, std::size_t from, std::size_t to) {
        const auto begin = segment.origin.begin();
        return {segment.text.substr(from, to - from), {begin + static_cast<long>(from), begin + static_cast<long>(to)}};
    }

    void encode_segment(const Segment& segment, std::vector<Token>& out) const {
        std::vector<Segment> words = {segment};
        for (const std::string& each : splits) {
            std::vector<Segment> finer;
            for (const Segment& word : words) {
                std::size_t from = 0;
                for (std::size_t at = word.text.find(each); at != word.text.npos; at = word.text.find(each, from)) {
                    finer.push_back(part(word, from, at + each.size()));
                    from = at + each.size();
                }
                if (from < word.text.size()) finer.push_back(part(word, from, word.text.size()));
            }
            words = std::move(finer);
        }
        for (const Segment& word : words) {
            if (!byte_level) {
                encode_word(word, out);
            } else if (!byte_level_regex) {
                encode_bytes(word, out);
            } else {
                const std::u32string points = decode(word.text);
                std::size_t byte = 0;
                for (std::size_t at = 0; at < points.size();) {
                    const std::size_t end = end_of_word(points, at), from = byte;
                    for (; at < end; ++at) next_code_point(word.text, byte);
                    encode_bytes(part(word, from, byte), out);
                }
            }
        }
    }
};

namespace {

std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    if (!file || !(text << file.rdbuf())) {
        throw Failure(ErrorKind::kCheckpoint, path + ": cannot be read ([Errno " + std::to_string(errno) + "] " +
                                                  std::strerror(errno) + ": " + repr(path) + "); expected a tokenizer.json.");
    }
    return std::move(text).str();
}

}  // namespace

Tokenizer::Tokenizer(const std::string& path) : Tokenizer(contents(path), path) {}

Tokenizer::Tokenizer(std::string_view document, const std::string& path) {
    auto parts = std::make_unique<Parts>();
    parts->path = path;
    Json json;
    try {
        json = parse_json(document, "JSON", kMaxBytes);
    } catch (const Failure& failure) {
        parts->refuse(failure.error().message);
    }
    if (Parts::is_set(json, "normalizer")) parts->read_normalizer(*json.find("normalizer"));
    if (Parts::is_set(json, "pre_tokenizer")) parts->read_pre_tokenizer(*json.find("pre_tokenizer"));
    if (Parts::is_set(json, "post_processor")) parts->read_post_processor(*json.find("post_processor"));
    if (!Parts::is_set(json, "model")) parts->refuse("no model");
    parts->read_model(*json.find("model"));
    for (const Json& each : parts->array_at(json, "added_tokens")) parts->read_added(each);
    parts_ = std::move(parts);
}

Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

std::optional<std::int64_t> Tokenizer::id(const std::string& token) const { return parts_->model.id(token); }

std::vector<Token> Tokenizer::encode(std::string_view text) const {
    std::vector<Token> out;
    for (const std::int64_t id : parts_->prefix) out.push_back({id, 0});
    Parts::Segment whole{std::string(text), std::vector<std::size_t>(text.size())};
    for (std::size_t at = 0; at < text.size();) {  // each byte of a character comes from where the character begins
        const std::size_t start = at;
        next_code_point(text, at);
        for (std::size_t i = start; i < at; ++i) whole.origin[i] = start;
    }
    const auto token = [&](const Token& found) { out.push_back(found); };
    Parts::cut(
        whole, parts_->raw_tokens,
        [&](const Parts::Segment& segment) {
            Parts::cut(
                parts_->normalized(segment), parts_->normalized_tokens,
                [&](const Parts::Segment& inner) { parts_->encode_segment(inner, out); }, token);
        },
        token);
    return out;
}

}  // namespace sana
