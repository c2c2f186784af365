#include "command.hpp"

#include <algorithm>
#include <charconv>

#include "python_text.hpp"

namespace sana::program {
namespace {

template <class T>
T number(const std::string& flag, const std::string& text) {
    T value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
        throw Failure(ErrorKind::kRequest, flag + ": got " + repr(text) + "; expected a number.");
    }
    return value;
}

}  // namespace

Arguments parse(const std::vector<std::string>& given, const std::vector<std::string>& flags) {
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
        if (flag == "--timings") {
            out.timings = true;
            continue;
        }
        if (flag == "--no-cuda-graphs") {
            out.options.cuda_graphs = false;
            continue;
        }
        if (flag == "--no-kernel-cache") {
            out.options.kernel_cache = "";
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
        const bool known = std::find(flags.begin(), flags.end(), flag) != flags.end();
        if (flag == "--backend")
            out.options.backend = value;
        else if (flag == "--kernel-cache")
            out.options.kernel_cache = value;
        else if (flag == "--threads")
            out.options.num_threads = number<int>(flag, value);
        else if (!known)
            throw Failure(ErrorKind::kRequest, "unknown option " + flag + ".\n" + kUsage);
        else if (flag == "--negative")
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
        else if (flag == "--schedule")
            out.request.schedule_file = value;
        else if (flag == "--bundle")
            out.bundle = value;
        else
            out.out = value;
    }
    return out;
}

}  // namespace sana::program
