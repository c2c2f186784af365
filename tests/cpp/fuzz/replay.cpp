// Runs the targets on files, where there is no libFuzzer: `replay TARGET FILE…`.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

#include "fuzz.hpp"

int main(int argc, char** argv) {
    if (argc < 2) return 2;
    const std::string name = argv[1];
    void (*target)(std::string_view) = name == "manifest"    ? fuzz_manifest
                                       : name == "tokenizer" ? fuzz_tokenizer
                                       : name == "png"       ? fuzz_png
                                                             : nullptr;
    if (target == nullptr) return 2;
    for (int i = 2; i < argc; ++i) {
        std::ifstream file(argv[i], std::ios::binary);
        const std::string data{std::istreambuf_iterator<char>(file), {}};
        std::fprintf(stderr, "%s\n", argv[i]);  // the last one is the culprit
        target(data);
    }
    std::printf("%d\n", argc - 2);
}
