// `sana replay PICTURE.png`: draws a picture again from its own metadata and compares the pixels. As apps/cli/replay.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <optional>

#include "bundle.hpp"
#include "command.hpp"
#include "digest.hpp"
#include "json.hpp"
#include "picture_info.hpp"
#include "python_text.hpp"
#include "unicode.hpp"

namespace sana::program {
namespace {

namespace fs = std::filesystem;

std::string printable(const std::string& text) {  // so that a picture's words cannot steer the terminal
    std::string out;
    for (const char32_t c : decode(text)) {
        std::string one;
        append(one, c);
        if (!is_printable(c)) {
            one = repr(one);
            one = one.substr(1, one.size() - 2);
        }
        out += one;
    }
    return out;
}

std::optional<std::string> digest_of(const fs::path& folder) {
    try {
        return sha256(read_bounded((folder / kManifestName).string(), kMaxJsonBytes));
    } catch (const Failure&) {  // not a bundle, or none for us
        return {};
    }
}

// The bundle with that digest in or beside the picture's folder, the folder above, the current one, or out/ in it.
std::string find_bundle(const std::string& picture, const std::string& digest) {
    const fs::path folder = fs::canonical(picture).parent_path(), here = fs::current_path();
    std::vector<fs::path> places;
    std::vector<std::string> looked;
    for (const fs::path& place : {folder, folder.parent_path(), here, here / "out"}) {
        if (std::find(places.begin(), places.end(), place) != places.end()) continue;
        places.push_back(place);
        looked.push_back(place.string());
        std::error_code unreadable;
        if (!fs::is_directory(place, unreadable)) continue;
        std::vector<fs::path> inner;
        for (const auto& each : fs::directory_iterator(place, unreadable)) {
            if (each.is_directory(unreadable) && !each.path().filename().string().starts_with(".")) inner.push_back(each.path());
        }
        std::sort(inner.begin(), inner.end());
        inner.insert(inner.begin(), place);
        for (const fs::path& each : inner) {
            if (digest_of(each) == digest) return each.string();
        }
    }
    throw Failure(ErrorKind::kMissingFile, "no bundle with the digest " + digest.substr(0, 12) + "… in " + join(looked) +
                                               " or a folder of these. Say where it is: --bundle DIR");
}

std::string difference(const Image& first, const Image& second) {  // "" if all pixels are equal
    if (first.width != second.width || first.height != second.height) {
        const auto size = [](const Image& image) { return std::to_string(image.width) + "x" + std::to_string(image.height); };
        throw Failure(ErrorKind::kRequest, "the picture has " + size(first) + " px, its metadata says " + size(second) +
                                               ": it was resized after it was drawn. Replay the original.");
    }
    std::size_t differ = 0, sum = 0, squares = 0;
    int largest = 0;
    for (std::size_t i = 0; i < first.pixels.size(); i += 3) {
        bool equal = true;
        for (std::size_t k = i; k < i + 3; ++k) {
            const int delta = std::abs(first.pixels[k] - second.pixels[k]);
            equal = equal && delta == 0;
            largest = std::max(largest, delta);
            sum += static_cast<std::size_t>(delta);
            squares += static_cast<std::size_t>(delta * delta);
        }
        differ += !equal;
    }
    if (differ == 0) return "";
    const auto count = static_cast<double>(first.pixels.size());
    char text[160];
    std::snprintf(text, sizeof text, "%.2f%% of the pixels, by at most %d of 255, by %.4f in the mean (PSNR %.1f dB)",
                  100 * static_cast<double>(differ) / (count / 3), largest, static_cast<double>(sum) / count,
                  10 * std::log10(255.0 * 255.0 / (static_cast<double>(squares) / count)));
    return text;
}

}  // namespace

int replay(const std::vector<std::string>& given) {
    Arguments arguments = parse(given, {"--bundle", "--out"});
    if (arguments.words.size() != 1) throw Failure(ErrorKind::kRequest, std::string("expected a picture.\n") + kUsage);
    const std::string& picture = arguments.words[0];
    const Image original = valued(read_png(picture));
    PictureInfo info = parse_picture_info(original.info, picture + " (metadata)");
    const std::string folder = arguments.bundle.empty() ? find_bundle(picture, info.drawer.bundle_digest) : arguments.bundle;
    // Unless another was asked for, what drew it: any other gives other last bits.
    if (arguments.options.backend == "auto") arguments.options.backend = info.drawer.backend;
    Engine engine = valued(Engine::open(folder, arguments.options));
    const std::string there = info.drawer.backend + " on " + printable(info.drawer.device);
    if (engine.backend() != info.drawer.backend) {  // asked for by name; alone, because not every backend has the same batches
        info.drawer.backend = engine.backend();
        info.batch_size = 1;
        info.batch_index = 0;
    }
    const Image again = valued(engine.replay(json_of(info)));
    if (!arguments.out.empty()) valued(save_png(again, arguments.out));
    const std::string found = difference(original, again);
    if (found.empty()) {
        std::cout << picture << ": identical, all " << original.width << "x" << original.height << " px (seed " << info.seed
                  << ")\n";
        return 0;
    }
    std::cout << picture << ": different: " << found << "\n";
    if (const std::string here = engine.backend() + " on " + engine.device(); here != there) {
        std::cout << "it was drawn by " << there << "; this is " << here << ": the last bits of a sum depend on both\n";
    } else {
        std::cout << "the picture was changed after it was drawn, or NumPy, ONNX Runtime or TensorRT were since\n";
    }
    return 1;
}

}  // namespace sana::program
