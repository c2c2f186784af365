// Runs parts of the C++ runtime for the tests: requests on stdin, answers on
// stdout, each "WORD BYTES\n" and that many bytes.
//
// An answer's word is "ok", or the name of the error's class; its bytes are
// what the request asks for, or the error's message.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <optional>
#include <sstream>
#include <string>

#include "bundle.hpp"
#include "digest.hpp"
#include "failure.hpp"
#include "json.hpp"
#include "manifest.hpp"
#include "narrow_floats.hpp"
#include "noise.hpp"
#include "onnx_locations.hpp"
#include "picture_info.hpp"
#include "png_reader.hpp"
#include "python_text.hpp"
#include "schedule.hpp"
#include "schedule_file.hpp"
#include "tokenizer.hpp"
#include "unicode.hpp"

namespace {

using namespace sana;

template <class T>
std::string raw(const std::vector<T>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

std::string noise(const std::string& body) {  // seed count stream -> float32
    std::istringstream in(body);
    std::uint64_t seed = 0;
    std::size_t count = 0;
    std::uint32_t stream = 0;
    in >> seed >> count >> stream;
    return raw(normal(seed, count, stream));
}

double real(const Json& value) {
    const auto* whole = value.get<std::int64_t>();
    return whole ? static_cast<double>(*whole) : std::get<double>(value.value);
}

std::string schedule(const std::string& body) {  // make_schedule's arguments as
                                                 // JSON -> sigmas, table
    const Json arguments = parse_json(body, "arguments");
    Recipe recipe;
    for (const auto& [key, value] : std::get<JsonObject>(arguments.value)) {
        const bool none = value.get<std::nullptr_t>() != nullptr;
        if (key == "scheduler") recipe.scheduler = std::get<std::string>(value.value);
        if (key == "num_steps" && !none) recipe.num_steps = std::get<std::int64_t>(value.value);
        if (key == "flow_shift") recipe.flow_shift = real(value);
        if (key == "timestep_scale") recipe.timestep_scale = real(value);
        if (key == "max_timestep" && !none) recipe.max_timestep = real(value);
        if (key == "intermediate_timestep") recipe.intermediate_timestep = none ? std::nullopt : std::optional(real(value));
        if (key == "spacing") {
            if (const auto* word = value.get<std::string>()) {
                recipe.spacing = *word;
            } else {
                recipe.times.emplace();
                for (const Json& each : std::get<JsonArray>(value.value)) recipe.times->push_back(real(each));
            }
        }
    }
    const Schedule made = make_schedule(recipe);
    return raw(made.sigmas) + raw(made.table);
}

std::string locations(const std::string& path) {
    std::string out;
    for (const std::string& each : external_locations(path)) out += each + "\n";
    return out;
}

std::string tokens(const std::string& body) {  // path and text, a NUL between ->
                                               // id and first byte of each
    static std::string open;
    static std::optional<Tokenizer> tokenizer;
    const std::size_t end = body.find('\0');
    if (const std::string path = body.substr(0, end); path != open || !tokenizer) {
        tokenizer.emplace(path);
        open = path;
    }
    std::vector<std::int64_t> out;
    for (const Token& token : tokenizer->encode(body.substr(end + 1))) {
        out.push_back(token.id);
        out.push_back(static_cast<std::int64_t>(token.start));
    }
    return raw(out);
}

std::string png(const std::string& body) {  // a file's bytes -> its info, a NUL and the pixels
    const Image image = decode_png(body, "picture.png");
    return image.info + '\0' + raw(image.pixels);
}

std::string narrow_floats() {  // all of float16, then all of bfloat16
    std::vector<float> out;
    for (const auto widen : {from_half, from_bfloat16}) {
        for (std::uint32_t bits = 0; bits < 1U << 16; ++bits) out.push_back(widen(static_cast<std::uint16_t>(bits)));
    }
    return raw(out);
}

std::string schedule_file(const std::string& path) {
    const Schedule made = read_schedule_file(path);
    return raw(made.sigmas) + raw(made.table);
}

std::string answer(const std::string& word, const std::string& body) {
    if (word == "manifest") return parse_manifest(body, "manifest.json").model;
    if (word == "json") return python_repr(parse_json(body, "manifest.json"));
    if (word == "bundle") return Bundle::open(body).digest;
    if (word == "unverified") return Bundle::open(body, false).digest;
    if (word == "locations") return locations(body);
    if (word == "noise") return noise(body);
    if (word == "schedule") return schedule(body);
    if (word == "tokens") return tokens(body);
    if (word == "info") return json_of(parse_picture_info(body, "picture"));
    if (word == "png") return png(body);
    if (word == "schedule_file") return schedule_file(body);
    if (word == "narrow_floats") return narrow_floats();
    if (word == "sha256") return sha256(body);
    if (word == "lower") return lower(body);
    if (word == "strip") return strip(body);
    if (word == "repr") return repr(body);
    throw std::invalid_argument("unknown request " + word);
}

}  // namespace

int main() {
    std::ios::sync_with_stdio(false);
    std::string word;
    std::size_t size = 0;
    while (std::cin >> word >> size) {
        std::cin.get();
        std::string body(size, '\0');
        std::cin.read(body.data(), static_cast<std::streamsize>(size));
        auto result = guard([&] { return answer(word, body); });
        const std::string kind(result ? "ok" : kind_name(result.error().kind));
        const std::string& text = result ? *result : result.error().message;
        std::cout << kind << ' ' << text.size() << '\n' << text << std::flush;
    }
}
