// The text encoder's table of tokens where it stays on the host. As runtime/token_table.py and engines/token_table.py.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "bundle.hpp"
#include "session.hpp"

namespace sana {

// (rows, channels) in a file, which is mapped: only rows that are looked up become resident.
class TokenTable {
  public:
    // Raises BundleError for a file that is no table of this shape and type; precision: fp32, fp16, bf16.
    TokenTable(std::string path, std::int64_t rows, std::int64_t channels, const std::string& precision);
    ~TokenTable();
    TokenTable(const TokenTable&) = delete;

    static std::unique_ptr<const TokenTable> of(const Bundle& bundle);  // nullptr: the bundle's is in graph and engines

    // int64 (B, S) -> float32 (B, S, channels), the file's numbers. Raises BundleError for an id that is no row, before any look-up.
    Tensor rows(const Tensor& ids) const;

  private:
    std::string path_;
    std::int64_t rows_, channels_;
    std::string precision_;
    std::uint64_t begin_ = 0;  // bytes before the first row
    std::size_t size_ = 0;     // of the file
    const char* mapped_ = nullptr;
};

// Inputs of a session, with the table's rows `inputs_embeds` in place of `input_ids`; without a table, or ids, as they are.
class LookedUp {
  public:
    LookedUp(const TokenTable* table, const Inputs& given);  // `given` must outlive it
    LookedUp(const LookedUp&) = delete;

    Inputs inputs;

  private:
    Tensor rows_;
};

}  // namespace sana
