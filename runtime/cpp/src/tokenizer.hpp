// Token ids from a tokenizer.json of the Hugging Face tokenizers library: those parts of it that Sana's models use.
//
// Byte pair encoding; before it, nothing, Replace, Split by a string, or ByteLevel; behind it, TemplateProcessing. That is
// Gemma-2's tokenizer and sana-tiny's. Anything else in the file is refused by its name: a part that is ignored would give other
// ids.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sana {

struct Token {
    std::int64_t id;
    std::size_t start;  // byte of the text where it begins; 0 for what the template adds
};

class Tokenizer {
  public:
    // Raises CheckpointError for a file that is missing, not a tokenizer, or one with parts that are not known here.
    explicit Tokenizer(const std::string& path);
    Tokenizer(std::string_view document, const std::string& path);  // of what the file holds
    Tokenizer(Tokenizer&&) noexcept;
    ~Tokenizer();

    std::vector<Token> encode(std::string_view text) const;  // UTF-8; with what the template adds. Safe from several threads.
    std::optional<std::int64_t> id(const std::string& token) const;

  private:
    struct Parts;
    std::unique_ptr<const Parts> parts_;
};

}  // namespace sana
