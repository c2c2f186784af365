// `sana generate BUNDLE PROMPT…`: draws pictures and prints where they are. As apps/cli/generate.py.
#include <algorithm>
#include <filesystem>
#include <iostream>

#include "command.hpp"
#include "python_text.hpp"
#include "timings.hpp"
#include "unicode.hpp"

namespace sana::program {
namespace {

// Letters (of any language) and digits of the prompt, in a form that every file system takes: at most 180 bytes.
std::string slug(const std::string& prompt) {
    constexpr std::size_t kMaxBytes = 180;
    std::string out;
    for (const char32_t c : decode(lower(prompt))) {
        if (c != U'_' && is_word(c)) {
            append(out, c);
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

}  // namespace

int generate(const std::vector<std::string>& given) {
    Arguments arguments = parse(given, {"--negative", "--seed", "--count", "--steps", "--guidance", "--width", "--height",
                                        "--scheduler", "--schedule", "--out"});
    if (arguments.words.size() < 2) throw Failure(ErrorKind::kRequest, std::string("expected a bundle and a prompt.\n") + kUsage);
    if (arguments.count < 1)
        throw Failure(ErrorKind::kRequest, "--count: got " + std::to_string(arguments.count) + "; expected at least 1.");
    if (arguments.out.empty()) arguments.out = ".";
    std::vector<std::string> prompts;
    for (std::size_t i = 1; i < arguments.words.size(); ++i) {
        if (!utf8_error(arguments.words[i]).empty())
            throw Failure(ErrorKind::kRequest, "prompts: got bytes that are not UTF-8. Set a UTF-8 locale.");
        prompts.insert(prompts.end(), static_cast<std::size_t>(arguments.count), arguments.words[i]);
    }
    std::vector<std::string> paths;
    for (std::size_t i = 0; i < prompts.size(); ++i)
        paths.push_back(picture_path(arguments.out, prompts[i], arguments.request.seeds[0] + i, prompts.size()));
    if (arguments.timings) timings::begin();  // benchmarks/cpp_runtime.py reads what they say
    Engine engine = valued(Engine::open(arguments.words[0], arguments.options));
    timings::tell("opened");
    timings::tell_memory("opened");
    std::cerr << "sana: backend: " << engine.backend() << " on " << engine.device() << ", because " << engine.backend_reason()
              << "\n";
    const std::uint64_t first = arguments.request.seeds[0];
    for (std::size_t i = 0; i < prompts.size(); ++i) {  // one at a time, so that each is there as soon as it is drawn
        arguments.request.prompts = {prompts[i]};
        arguments.request.seeds = {first + i};
        timings::tell("asked");
        const Pictures pictures = valued(engine.generate(arguments.request));
        timings::tell("drawn");
        if (i == 0) timings::tell_memory("first picture");
        timings::start_is_over();
        for (const std::string& warning : pictures.warnings) std::cerr << "sana: warning: " << warning << "\n";
        std::cout << valued(save_png(pictures.images[0], paths[i])) << std::endl;
    }
    timings::tell_memory("end");
    return 0;
}

}  // namespace sana::program
