#include "prompt.hpp"

#include <utility>

#include "failure.hpp"
#include "python_text.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

constexpr std::size_t kShown = 300;  // characters of a cut that a warning shows

std::string shortened(std::string_view text) {
    std::size_t end = 0;
    for (std::size_t i = 0; i < kShown && end < text.size(); ++i) next_code_point(text, end);
    return end == text.size() ? std::string(text) : std::string(text.substr(0, end)) + "…";
}

}  // namespace

PromptTokenizer::PromptTokenizer(const std::string& path, PromptInfo prompt) : prompt_(std::move(prompt)), tokenizer_(path) {
    if (prompt_.max_sequence_length < 2) {
        throw Failure(ErrorKind::kSpec, "max_sequence_length: got " + std::to_string(prompt_.max_sequence_length) +
                                            "; expected 2 to 8192 (<bos> and a token at least).");
    }
    pad_ = token("<pad>", path);
    const std::int64_t bos = token("<bos>", path);
    std::vector<std::string> empty;
    for (const Token& each : tokenizer_.encode("")) empty.push_back(std::to_string(each.id));
    if (empty != std::vector{std::to_string(bos)}) {
        throw Failure(ErrorKind::kCheckpoint,
                      path + ": the empty text became the tokens [" + join(empty) + "]; expected [" + std::to_string(bos) +
                          "], <bos> alone. The post_processor must put it before every text and nothing behind.");
    }
    if (!prompt_.complex_human_instruction.empty())
        instruction_tokens_ = tokenizer_.encode(prompt_.complex_human_instruction).size();
}

std::int64_t PromptTokenizer::token(const char* name, const std::string& path) const {
    const auto found = tokenizer_.id(name);
    if (!found)
        throw Failure(ErrorKind::kCheckpoint,
                      path + ": no token " + repr(name) + "; expected a tokenizer with <pad> and <bos>, as Gemma's.");
    return *found;
}

Text PromptTokenizer::encode(const std::string& prompt, bool negative, std::vector<std::string>& warnings) const {
    const auto kept = static_cast<std::size_t>(prompt_.max_sequence_length);
    const std::size_t length = negative || instruction_tokens_ == 0 ? kept : instruction_tokens_ + kept - 2;
    const std::string text =
        (negative ? "" : prompt_.complex_human_instruction) + (prompt_.lowercase ? strip(lower(prompt)) : prompt);
    const std::vector<Token> tokens = tokenizer_.encode(text);
    if (tokens.size() > length) {
        const std::string lost = shortened(std::string_view(text).substr(tokens[length].start));
        warnings.push_back(std::string(negative ? "negative prompt" : "prompt") + ": " + std::to_string(tokens.size() - length) +
                           " tokens too long for the " + std::to_string(kept) + " that the model reads; cut: " + repr(lost));
    }
    Text out{std::vector<std::int64_t>(length, pad_), std::vector<std::int64_t>(length, 0), std::vector<float>(kept)};
    for (std::size_t i = 0; i < length && i < tokens.size(); ++i) {
        out.ids[i] = tokens[i].id;
        out.mask[i] = 1;
    }
    for (std::size_t i = 0; i < kept; ++i) out.selected_mask[i] = static_cast<float>(out.mask[i == 0 ? 0 : length - kept + i]);
    return out;
}

}  // namespace sana
