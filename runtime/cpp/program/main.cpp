// `sana generate BUNDLE PROMPT…`: draws pictures and prints where they are. The flags of apps/cli/generate.py that need no Python.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <string>
#include <string_view>
#include <vector>

#include "failure.hpp"
#include "python_text.hpp"
#include "sana/engine.hpp"
#include "unicode.hpp"

namespace {

using sana::ErrorKind;
using sana::Failure;
using sana::repr;

constexpr const char* kUsage =
    "usage: sana generate BUNDLE PROMPT… [--negative TEXT] [--seed N] [--count N] [--steps N] [--guidance X] [--width PX] "
    "[--height PX]\n"
    "                     [--scheduler NAME] [--backend NAME] [--no-verify] [--threads N] [--low-memory] [--out DIR|FILE.png]\n"
    "       sana --version\n";

struct Arguments {
    std::vector<std::string> words;  // bundle, prompts
    sana::Request request;
    sana::EngineOptions options;
    long count = 1;
    std::string out = ".";
};

template <class T>
T number(const std::string& flag, const std::string& text) {
    T value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
        throw Failure(ErrorKind::kRequest, flag + ": got " + repr(text) + "; expected a number.");
    }
    return value;
}

Arguments parse(const std::vector<std::string>& given) {
    Arguments out;
    for (std::size_t i = 0; i < given.size(); ++i) {
        std::string flag = given[i];
        if (flag.size() < 2 || flag[0] != '-') {
            out.words.push_back(flag);
            continue;
        }
        if (flag == "--") {
            out.words.insert(out.words.end(), given.begin() + static_cast<long>(i) + 1, given.end());
            break;
        }
        if (flag == "--no-verify") {
            out.options.verify = false;
            continue;
        }
        if (flag == "--low-memory") {
            out.options.low_memory = true;
            continue;
        }
        std::string value;
        if (const std::size_t equals = flag.find('='); equals != flag.npos) {
            value = flag.substr(equals + 1);
            flag.resize(equals);
        } else if (i + 1 < given.size()) {
            value = given[++i];
        } else {
            throw Failure(ErrorKind::kRequest, flag + ": expected a value behind it.");
        }
        if (flag == "--negative")
            out.request.negative_prompts = {value};
        else if (flag == "--seed")
            out.request.seeds = {number<std::uint64_t>(flag, value)};
        else if (flag == "--count")
            out.count = number<long>(flag, value);
        else if (flag == "--steps")
            out.request.steps = number<long>(flag, value);
        else if (flag == "--guidance")
            out.request.guidance = number<double>(flag, value);
        else if (flag == "--width")
            out.request.width = number<long>(flag, value);
        else if (flag == "--height")
            out.request.height = number<long>(flag, value);
        else if (flag == "--scheduler")
            out.request.scheduler = value;
        else if (flag == "--backend")
            out.options.backend = value;
        else if (flag == "--threads")
            out.options.num_threads = number<int>(flag, value);
        else if (flag == "--out")
            out.out = value;
        else
            throw Failure(ErrorKind::kRequest, "unknown option " + flag + ".\n" + kUsage);
    }
    if (out.words.size() < 2) throw Failure(ErrorKind::kRequest, std::string("expected a bundle and a prompt.\n") + kUsage);
    if (out.count < 1) throw Failure(ErrorKind::kRequest, "--count: got " + std::to_string(out.count) + "; expected at least 1.");
    return out;
}

// Letters (of any language) and digits of the prompt, in a form that every file system takes: at most 180 bytes.
std::string slug(const std::string& prompt) {
    constexpr std::size_t kMaxBytes = 180;
    std::string out;
    for (const char32_t c : sana::decode(sana::lower(prompt))) {
        if (c != U'_' && sana::is_word(c)) {
            sana::append(out, c);
        } else if (!out.empty() && out.back() != '-') {
            out += '-';
        }
    }
    while (out.size() > kMaxBytes) {  // whole characters
        std::size_t last = out.size() - 1;
        while ((static_cast<unsigned char>(out[last]) & 0xC0) == 0x80) --last;
        out.resize(last);
    }
    while (out.ends_with('-')) out.pop_back();
    return out.empty() ? "picture" : out;
}

std::string picture_path(const std::string& out, const std::string& prompt, std::uint64_t seed, std::size_t count) {
    std::string suffix = std::filesystem::path(out).extension().string();
    std::transform(suffix.begin(), suffix.end(), suffix.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    static const std::vector<std::string> kNotPng = {".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"};
    if (std::find(kNotPng.begin(), kNotPng.end(), suffix) != kNotPng.end()) {
        throw Failure(ErrorKind::kRequest,
                      "--out: got " + repr(out) + "; expected a .png file, which can say how it was drawn, or a folder.");
    }
    if (suffix == ".png" && !std::filesystem::is_directory(out)) {
        if (count > 1) {
            throw Failure(ErrorKind::kRequest,
                          "--out: got one file, " + repr(out) + ", for " + std::to_string(count) + " pictures; expected a folder.");
        }
        return out;
    }
    return (std::filesystem::path(out) / (slug(prompt) + "-" + std::to_string(seed) + ".png")).lexically_normal().string();
}

template <class T>
T valued(sana::Result<T> result) {
    if (!result) throw Failure(result.error().kind, result.error().message);
    return std::move(*result);
}

int generate(const std::vector<std::string>& given) {
    Arguments arguments = parse(given);
    std::vector<std::string> prompts;
    for (std::size_t i = 1; i < arguments.words.size(); ++i) {
        if (!sana::utf8_error(arguments.words[i]).empty())
            throw Failure(ErrorKind::kRequest, "prompts: got bytes that are not UTF-8. Set a UTF-8 locale.");
        prompts.insert(prompts.end(), static_cast<std::size_t>(arguments.count), arguments.words[i]);
    }
    std::vector<std::string> paths;
    for (std::size_t i = 0; i < prompts.size(); ++i)
        paths.push_back(picture_path(arguments.out, prompts[i], arguments.request.seeds[0] + i, prompts.size()));
    sana::Engine engine = valued(sana::Engine::open(arguments.words[0], arguments.options));
    std::cerr << "sana: backend: " << engine.backend() << " on " << engine.device() << ", because " << engine.backend_reason()
              << "\n";
    const std::uint64_t first = arguments.request.seeds[0];
    for (std::size_t i = 0; i < prompts.size(); ++i) {  // one at a time, so that each is there as soon as it is drawn
        arguments.request.prompts = {prompts[i]};
        arguments.request.seeds = {first + i};
        const sana::Pictures pictures = valued(engine.generate(arguments.request));
        for (const std::string& warning : pictures.warnings) std::cerr << "sana: warning: " << warning << "\n";
        std::cout << valued(sana::save_png(pictures.images[0], paths[i])) << std::endl;
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    if (arguments.empty() || arguments[0] == "--help" || arguments[0] == "-h") {
        (arguments.empty() ? std::cerr : std::cout) << kUsage;
        return arguments.empty() ? 2 : 0;
    }
    if (arguments[0] == "--version") {
        std::cout << "sana " << SANA_VERSION << " (libsana_runtime)\n";
        return 0;
    }
    const auto done = sana::guard([&] {
        if (arguments[0] != "generate") {
            throw Failure(ErrorKind::kSana, "unknown command " + repr(arguments[0]) + "; " +
                                                sana::nearest(arguments[0], {"generate"}) + ". Try: sana --help");
        }
        return generate({arguments.begin() + 1, arguments.end()});
    });
    if (done) return 0;
    std::cerr << "sana: error: " << done.error().message << "\n";
    return 2;
}
