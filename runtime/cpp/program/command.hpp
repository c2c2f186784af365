// What the commands of `sana` share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "failure.hpp"
#include "sana/engine.hpp"

namespace sana::program {

inline constexpr const char* kUsage =
    "usage: sana generate BUNDLE PROMPT… [--negative TEXT] [--seed N] [--count N] [--steps N] [--guidance X] [--width PX] "
    "[--height PX]\n"
    "                     [--scheduler NAME | --schedule FILE.yaml] [--out DIR|FILE.png] [OPTIONS]\n"
    "       sana replay PICTURE.png [--bundle BUNDLE] [--out FILE.png] [OPTIONS]\n"
    "       sana --version\n"
    "options: [--backend auto|tensorrt|onnxruntime] [--no-verify] [--low-memory] [--threads N] [--no-cuda-graphs]\n"
    "         [--kernel-cache DIR | --no-kernel-cache] [--timings]\n";

struct Arguments {
    std::vector<std::string> words;  // those that belong to no flag
    Request request;
    EngineOptions options;
    long count = 1;
    bool timings = false;
    std::string out, bundle;
};

// Takes the flags that are named, beside those of the engine. Raises RequestError.
Arguments parse(const std::vector<std::string>& given, const std::vector<std::string>& flags);

template <class T>
T valued(Result<T> result) {
    if (!result) throw Failure(result.error().kind, result.error().message);
    return std::move(*result);
}

// Exit codes: 0 done; 1 compared, and different. Errors are raised.
int generate(const std::vector<std::string>& given);
int replay(const std::vector<std::string>& given);

}  // namespace sana::program
