// What the fuzz targets share. Each takes any bytes; it must not crash, hang, or break what `require` says.
#pragma once

#include <cstdlib>
#include <string_view>

inline void require(bool so) {
    if (!so) std::abort();
}

void fuzz_manifest(std::string_view data);
void fuzz_tokenizer(std::string_view data);
void fuzz_png(std::string_view data);
