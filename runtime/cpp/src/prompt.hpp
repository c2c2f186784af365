// From prompts to token ids: the instruction before the prompt, and the slice that the denoiser sees. As runtime/prompt.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "tokenizer.hpp"

namespace sana {

constexpr std::size_t kMaxPromptCharacters = 100'000;
constexpr std::size_t kMaxPrompts = 1024;

struct Text {                             // one tokenized text
    std::vector<std::int64_t> ids, mask;  // (S)
    std::vector<float> selected_mask;     // (L), the mask where the encoder's output is kept
};

class PromptTokenizer {
  public:
    // Raises CheckpointError for a file that is missing, not a tokenizer, or one that does not put <bos> first.
    PromptTokenizer(const std::string& path, PromptInfo prompt);

    // negative: without the instruction. A prompt that does not fit is cut, and `warnings` gets a line with what is lost.
    Text encode(const std::string& prompt, bool negative, std::vector<std::string>& warnings) const;

  private:
    std::int64_t token(const char* name, const std::string& path) const;

    PromptInfo prompt_;
    Tokenizer tokenizer_;
    std::int64_t pad_ = 0;
    std::size_t instruction_tokens_ = 0;
};

}  // namespace sana
