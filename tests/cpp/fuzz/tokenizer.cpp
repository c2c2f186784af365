// Any bytes as tokenizer.json and a prompt, a NUL between; without one, as a prompt for a tokenizer with the parts of Gemma's.
#include "tokenizer.hpp"
#include "failure.hpp"
#include "fuzz.hpp"
#include "unicode.hpp"

namespace {

constexpr const char* kGemmaLike = R"({"added_tokens": [{"id": 0, "content": "<pad>", "special": true, "normalized": false},
 {"id": 1, "content": "<bos>", "special": true, "normalized": false}, {"id": 9, "content": "xy", "normalized": true}],
 "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
 "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false},
 "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}},
 {"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}}},
 "model": {"type": "BPE", "unk_token": "u", "fuse_unk": true, "byte_fallback": true, "vocab": {"<pad>": 0, "<bos>": 1, "u": 2,
 "a": 3, "b": 4, "ab": 5, "▁": 6, "▁a": 7, "aba": 8, "<0x0A>": 10, "<0xC3>": 11, "<0xA9>": 12}, "merges": [["a", "b"], ["▁", "a"],
 ["ab", "a"]]}})";

void encode(const sana::Tokenizer& tokenizer, std::string_view prompt) {
    std::size_t last = 0;
    for (const sana::Token& token : tokenizer.encode(prompt)) {
        require(token.start >= last && (token.start < prompt.size() || token.start == 0));
        last = token.start;
    }
}

}  // namespace

void fuzz_tokenizer(std::string_view data) {
    static const sana::Tokenizer gemma_like(std::string(kGemmaLike), "tokenizer.json");
    const std::size_t nul = data.find('\0');
    const std::string_view prompt = nul == data.npos ? data : data.substr(nul + 1);
    if (!sana::utf8_error(prompt).empty()) return;  // refused before it comes here
    if (nul == data.npos) return encode(gemma_like, prompt);
    try {
        encode(sana::Tokenizer(std::string(data.substr(0, nul)), "tokenizer.json"), prompt);
    } catch (const sana::Failure& failure) {
        require(!failure.error().message.empty());
    }
}
