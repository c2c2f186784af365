#include "picture_info.hpp"

#include <algorithm>
#include <cstdio>

#include "json.hpp"
#include "prompt.hpp"
#include "python_text.hpp"
#include "schema.hpp"

namespace sana {
namespace {

std::string number_or_null(const std::optional<double>& value) { return value ? repr(*value) : "null"; }

std::string spacing_of(const Recipe& recipe) {
    if (!recipe.times) return json_string(recipe.spacing);
    std::vector<std::string> numbers;
    for (const double each : *recipe.times) numbers.push_back(repr(each));
    return "[" + join(numbers, ",") + "]";
}

constexpr TextLimits kPrompt{.most = kMaxPromptCharacters}, kName{.most = 4096};

void read_spacing(Reader& reader, const Json& value, const Place& at, Recipe& out) {
    static const std::vector<std::string> words = {"linear", "exponential", "karras"};
    const auto* word = value.get<std::string>();
    if (word != nullptr && std::find(words.begin(), words.end(), *word) != words.end()) {
        out.spacing = *word;
        return;
    }
    Reader as_list;  // its complaints count once there are any: of a union, pydantic shows those of all members
    const Place list = at / "tuple[constrained-float, ...]";
    std::vector<double> times;
    as_list.array(value, list, [&](const Json& v, const Place& p) {
        const std::size_t before = as_list.count();
        double time = 0;
        as_list.real(v, p, kPositive, time);
        if (as_list.count() == before) times.push_back(time);
    });
    const auto* items = value.get<JsonArray>();
    if (items != nullptr && times.empty()) as_list.got(list, value, "tuple should have at least 1 item after validation, not 0");
    if (times.size() > static_cast<std::size_t>(kMaxSteps)) {
        as_list = {};  // nothing else is said then
        as_list.got(list, value, "tuple should have at most 1000 items after validation, not " + std::to_string(items->size()));
    }
    if (as_list.clean()) {
        out.times = std::move(times);
        return;
    }
    std::string unused;
    reader.word(value, at / "literal['linear','exponential','karras']", words, unused);
    reader.add(as_list);
}

void read_recipe(Reader& reader, const Json& value, const Place& at, Recipe& out) {
    std::int64_t steps = 0;
    out.intermediate_timestep.reset();  // what is left out is none here
    reader.object(
        value, at,
        {
            {"scheduler", [&](const Json& v, const Place& p) { reader.word(v, p, scheduler_names(), out.scheduler); }},
            {"num_steps", [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 1, .most = kMaxSteps}, steps); }},
            {"flow_shift", [&](const Json& v, const Place& p) { reader.real(v, p, kPositive, out.flow_shift); }, false},
            {"spacing", [&](const Json& v, const Place& p) { read_spacing(reader, v, p, out); }, false},
            {"max_timestep", [&](const Json& v, const Place& p) { reader.real_or_null(v, p, kPositive, out.max_timestep); }, false},
            {"intermediate_timestep",
             [&](const Json& v, const Place& p) { reader.real_or_null(v, p, kPositive, out.intermediate_timestep); }, false},
        });
    out.num_steps = steps;
}

void read_info(Reader& reader, const Json& document, PictureInfo& out) {
    const auto text = [&](std::string& to, const TextLimits& limits) {
        return [&, limits](const Json& v, const Place& p) { reader.text(v, p, limits, to); };
    };
    const auto side = [&](std::int64_t& to) {
        return [&](const Json& v, const Place& p) {
            reader.integer(v, p, {.least = kPxPerLatent, .most = 16384, .multiple_of = kPxPerLatent}, to);
        };
    };
    reader.object(
        document, {},
        {
            {"format", [&](const Json& v, const Place& p) { reader.number_word(v, p, 1); }, false},
            {"prompt", text(out.prompt, kPrompt)},
            {"negative_prompt", text(out.negative_prompt, kPrompt)},
            {"seed", [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 0}, out.seed); }},
            {"guidance", [&](const Json& v, const Place& p) { reader.real(v, p, {}, out.guidance); }},
            {"width", side(out.width)},
            {"height", side(out.height)},
            {"schedule", [&](const Json& v, const Place& p) { read_recipe(reader, v, p, out.recipe); }},
            {"model", text(out.drawer.model, kName)},
            {"bundle_digest",
             [&](const Json& v, const Place& p) {
                 reader.pattern(v, p, "^[0-9a-f]{64}$", is_sha256, {}, out.drawer.bundle_digest);
             }},
            {"backend", [&](const Json& v, const Place& p) { reader.word(v, p, {"tensorrt", "onnxruntime"}, out.drawer.backend); }},
            {"device", text(out.drawer.device, kName)},
            {"batch_size",
             [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 1, .most = 1024}, out.batch_size); }},
            {"batch_index",
             [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 0, .most = 1023}, out.batch_index); }},
            {"program", text(out.program, kName)},
        });
}

}  // namespace

PictureInfo picture_info(const CheckedRequest& request, std::size_t index, const Drawer& drawer) {
    PictureInfo out;
    out.prompt = request.prompts[index];
    out.negative_prompt = request.negative_prompts[index];
    out.seed = request.seeds[index];
    out.guidance = request.guidance;
    out.width = request.width;
    out.height = request.height;
    out.recipe = request.schedule.recipe;
    out.drawer = drawer;
    return out;
}

std::string json_of(const PictureInfo& info) {
    const Recipe& recipe = info.recipe;
    const std::string schedule = "{\"scheduler\":" + json_string(recipe.scheduler) +
                                 ",\"num_steps\":" + std::to_string(*recipe.num_steps) +
                                 ",\"flow_shift\":" + repr(recipe.flow_shift) + ",\"spacing\":" + spacing_of(recipe) +
                                 ",\"max_timestep\":" + number_or_null(recipe.max_timestep) +
                                 ",\"intermediate_timestep\":" + number_or_null(recipe.intermediate_timestep) + "}";
    return "{\"format\":1,\"prompt\":" + json_string(info.prompt) + ",\"negative_prompt\":" + json_string(info.negative_prompt) +
           ",\"seed\":" + std::to_string(info.seed) + ",\"guidance\":" + repr(info.guidance) +
           ",\"width\":" + std::to_string(info.width) + ",\"height\":" + std::to_string(info.height) + ",\"schedule\":" + schedule +
           ",\"model\":" + json_string(info.drawer.model) + ",\"bundle_digest\":" + json_string(info.drawer.bundle_digest) +
           ",\"backend\":" + json_string(info.drawer.backend) + ",\"device\":" + json_string(info.drawer.device) +
           ",\"batch_size\":" + std::to_string(info.batch_size) + ",\"batch_index\":" + std::to_string(info.batch_index) +
           ",\"program\":" + json_string(info.program) + "}";
}

PictureInfo parse_picture_info(std::string_view text, const std::string& source) {
    text = text.substr(0, kMaxInfoBytes + 1);
    const Json document = parse_json(text, source);
    PictureInfo out;
    Reader reader;
    if (const std::string error = second_opinion(text); !error.empty()) {
        reader.complain_of_bytes(text, error);
    } else {
        read_info(reader, document, out);
    }
    reader.finish(source);
    return out;
}

}  // namespace sana
