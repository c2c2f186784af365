#include "manifest.hpp"

#include <algorithm>
#include <set>

#include "digest.hpp"
#include "failure.hpp"
#include "json.hpp"
#include "paths.hpp"
#include "python_text.hpp"
#include "schema.hpp"

namespace sana {
namespace {

const std::vector<std::string> kPrecisions = {"fp32", "fp16", "bf16", "int8", "fp8", "nvfp4"};
const std::vector<std::string> kTargets = {"sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "sm121"};
const std::vector<std::string> kRoles = {"graph", "weights", "engine", "tokenizer", "golden", "report", "licence"};
const std::vector<std::string> kSchedulers = {"flow_euler", "flow_dpm_solver", "scm"};

constexpr TextLimits kText{.most = 65536};
constexpr const char* kSha256 = "^[0-9a-f]{64}$";
constexpr const char* kVersion = R"(^[0-9]+(\.[0-9]+){1,3}$)";

void read_ranges(Reader& reader, const Json& value, const Place& at, ShapeRange& out) {
    const auto side = [&](std::int64_t& to) {
        return [&](const Json& v, const Place& p) {
            reader.integer(v, p, {.least = kPxPerLatent, .most = 16384, .multiple_of = kPxPerLatent}, to);
        };
    };
    const bool fine = reader.object(
        value, at,
        {
            {"min_side", side(out.min_side)},
            {"opt_side", side(out.opt_side)},
            {"max_side", side(out.max_side)},
            {"max_batch", [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 1, .most = 1024}, out.max_batch); }},
            {"max_sequence_length",
             [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 1, .most = 8192}, out.max_sequence_length); }},
        });
    if (fine && !(out.min_side <= out.opt_side && out.opt_side <= out.max_side)) {
        reader.complain(at, "sides: got " + std::to_string(out.min_side) + ", " + std::to_string(out.opt_side) + ", " +
                                std::to_string(out.max_side) + " px; expected min <= opt <= max");
    }
}

void read_schedule(Reader& reader, const Json& value, const Place& at, ScheduleInfo& out) {
    const RealLimits positive{.above = 0};
    reader.object(
        value, at,
        {
            {"scheduler", [&](const Json& v, const Place& p) { reader.word(v, p, kSchedulers, out.scheduler); }},
            {"flow_shift", [&](const Json& v, const Place& p) { reader.real(v, p, positive, out.flow_shift); }, false},
            {"num_inference_steps",
             [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 1, .most = 1000}, out.num_inference_steps); }},
            {"guidance_scale",
             [&](const Json& v, const Place& p) { reader.real(v, p, {.least = 0, .most = 100}, out.guidance_scale); }},
            {"timestep_scale", [&](const Json& v, const Place& p) { reader.real(v, p, positive, out.timestep_scale); }, false},
            {"max_timestep", [&](const Json& v, const Place& p) { reader.real_or_null(v, p, positive, out.max_timestep); }, false},
            {"intermediate_timestep",
             [&](const Json& v, const Place& p) { reader.real_or_null(v, p, positive, out.intermediate_timestep); }, false},
        });
}

void read_prompt(Reader& reader, const Json& value, const Place& at, PromptInfo& out) {
    reader.object(
        value, at,
        {
            {"complex_human_instruction",
             [&](const Json& v, const Place& p) { reader.text(v, p, kText, out.complex_human_instruction); }},
            {"max_sequence_length",
             [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 1, .most = 8192}, out.max_sequence_length); }},
            {"lowercase", [&](const Json& v, const Place& p) { reader.boolean(v, p, out.lowercase); }, false},
        });
}

void read_latents(Reader& reader, const Json& value, const Place& at, LatentInfo& out) {
    reader.object(
        value, at,
        {
            {"channels", [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 1, .most = 4096}, out.channels); }},
            {"scaling_factor", [&](const Json& v, const Place& p) { reader.real(v, p, {.above = 0}, out.scaling_factor); }},
            {"px_per_latent", [&](const Json& v, const Place& p) { reader.number_word(v, p, kPxPerLatent); }, false},
        });
}

void read_tensorrt(Reader& reader, const Json& value, const Place& at, std::optional<TensorRTInfo>& out) {
    if (value.get<std::nullptr_t>()) return;
    out.emplace();
    reader.object(value, at,
                  {
                      {"flavor", [&](const Json& v, const Place& p) { reader.word(v, p, {"rtx", "full"}, out->flavor); }},
                      {"version", [&](const Json& v,
                                      const Place& p) { reader.pattern(v, p, kVersion, is_version, {.most = 64}, out->version); }},
                  });
}

void read_file(Reader& reader, const Json& value, const Place& at, FileEntry& out) {
    const auto part = [&](const Json& v, const Place& p) {
        reader.pattern(v, p, kSha256, is_sha256, {}, out.parts.emplace_back());
    };
    const bool fine = reader.object(
        value, at,
        {
            {"sha256", [&](const Json& v, const Place& p) { reader.pattern(v, p, kSha256, is_sha256, {}, out.sha256); }},
            {"size",
             [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 0, .most = std::int64_t{1} << 50}, out.size); }},
            {"role", [&](const Json& v, const Place& p) { reader.word(v, p, kRoles, out.role); }},
            {"parts", [&](const Json& v, const Place& p) { reader.array(v, p, part); }, false},
        });
    if (fine && !out.parts.empty() && out.parts.size() != num_parts(out.size)) {
        reader.complain(at, "parts: got " + std::to_string(out.parts.size()) + " digests for " + std::to_string(out.size) +
                                " bytes; expected " + std::to_string(num_parts(out.size)) +
                                ", one for each 64 MiB of a file that is larger");
    }
}

template <class T>
void read_components(Reader& reader, const Json& value, const Place& at, Named<T>& out,
                     const std::function<void(const Json&, const Place&, T&)>& read) {
    reader.dictionary(value, at, [&](const std::string& key, const Json& inner, const Place& place) {
        std::string name;
        reader.word(Json{key}, place, component_names(), name);
        out.emplace_back(key, T{});
        read(inner, place, out.back().second);
    });
}

void read_manifest(Reader& reader, const Json& document, Manifest& out) {
    const auto precision = [&](const Json& v, const Place& p) {
        read_components<std::string>(reader, v, p, out.precision,
                                     [&](const Json& w, const Place& q, std::string& to) { reader.word(w, q, kPrecisions, to); });
    };
    const auto plugins = [&](const Json& v, const Place& p) {
        read_components<Named<std::int64_t>>(
            reader, v, p, out.plugins, [&](const Json& w, const Place& q, Named<std::int64_t>& to) {
                reader.dictionary(w, q, [&](const std::string& op, const Json& count, const Place& r) {
                    std::string name;
                    reader.text(Json{op}, r, {.most = 256}, name);
                    to.emplace_back(op, 0);
                    reader.integer(count, r, {.least = 1, .most = 1'000'000}, to.back().second);
                });
            });
    };
    const auto targets = [&](const Json& v, const Place& p) {
        reader.array(v, p, [&](const Json& w, const Place& q) { reader.word(w, q, kTargets, out.targets.emplace_back()); });
    };
    const auto files = [&](const Json& v, const Place& p) {
        reader.dictionary(v, p, [&](const std::string& name, const Json& w, const Place& q) {
            out.files.emplace_back(name, FileEntry{});
            read_file(reader, w, q, out.files.back().second);
        });
    };
    reader.object(
        document, {},
        {
            {"schema_version",
             [&](const Json& v, const Place& p) {
                 reader.integer(v, p, {.least = kOldestSchema, .most = kNewestSchema}, out.schema_version);
             },
             false},
            {"model", [&](const Json& v, const Place& p) { reader.text(v, p, {.least = 1, .most = 4096}, out.model); }},
            {"model_digest",
             [&](const Json& v, const Place& p) { reader.pattern(v, p, kSha256, is_sha256, {}, out.model_digest); }},
            {"variant", [&](const Json& v, const Place& p) { reader.text(v, p, {.least = 1, .most = 256}, out.variant); }},
            {"precision", precision},
            {"ranges", [&](const Json& v, const Place& p) { read_ranges(reader, v, p, out.ranges); }},
            {"targets", targets},
            {"tensorrt", [&](const Json& v, const Place& p) { read_tensorrt(reader, v, p, out.tensorrt); }},
            {"plugins", plugins},
            {"schedule", [&](const Json& v, const Place& p) { read_schedule(reader, v, p, out.schedule); }},
            {"prompt", [&](const Json& v, const Place& p) { read_prompt(reader, v, p, out.prompt); }},
            {"latents", [&](const Json& v, const Place& p) { read_latents(reader, v, p, out.latents); }},
            {"guidance_embeds", [&](const Json& v, const Place& p) { reader.boolean(v, p, out.guidance_embeds); }},
            {"caption_channels",
             [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 1, .most = 1 << 20}, out.caption_channels); }},
            {"token_table_rows",
             [&](const Json& v, const Place& p) { reader.integer(v, p, {.least = 0, .most = 1 << 30}, out.token_table_rows); },
             false},
            {"licence", [&](const Json& v, const Place& p) { reader.text(v, p, kText, out.licence); }},
            {"files", files},
        });
}

template <class T>
std::vector<std::string> keys(const Named<T>& named) {
    std::vector<std::string> out;
    for (const auto& [key, value] : named) out.push_back(key);
    return out;
}

template <class T>
const T* find(const Named<T>& named, std::string_view key) {
    for (const auto& [name, value] : named) {
        if (name == key) return &value;
    }
    return nullptr;
}

bool contains(const std::vector<std::string>& words, std::string_view word) {
    return std::find(words.begin(), words.end(), word) != words.end();
}

// What the fields say of one another. Returns the first thing that is wrong, or "".
std::string inconsistency(const Manifest& m) {
    const std::string count = std::to_string(m.targets.size());
    if (m.targets.empty() == m.tensorrt.has_value()) {
        return "targets and tensorrt: got " + count + " targets and " + (m.tensorrt ? "a" : "no") +
               " TensorRT version; expected both or neither";
    }
    if (std::set<std::string>(m.targets.begin(), m.targets.end()).size() != m.targets.size()) {
        return "targets: got " + join(m.targets) + "; expected each once";
    }
    if (m.prompt.max_sequence_length != m.ranges.max_sequence_length) {
        return "max_sequence_length: got " + std::to_string(m.prompt.max_sequence_length) + " under prompt and " +
               std::to_string(m.ranges.max_sequence_length) + " under ranges; expected the same";
    }
    if (m.token_table_rows > 0 && m.schema_version < kTableSchema) {
        return "schema_version: got " + std::to_string(m.schema_version) + " with token_table_rows; expected 3 or 4";
    }
    if (m.files.size() > kMaxFiles) {
        return "files: got " + std::to_string(m.files.size()) + " files; expected at most " + std::to_string(kMaxFiles);
    }
    for (const auto& [name, entry] : m.files) {
        check_relative(name, kManifestName);
        if (name == kManifestName) return "files: got manifest.json itself, whose digest cannot be inside it";
        for (const std::string& target : engine_targets(name)) {
            if (!contains(m.targets, target)) {
                return "files: got the engine " + repr(name) + " for a GPU outside targets (" +
                       (m.targets.empty() ? "none" : join(m.targets)) + ")";
            }
        }
    }
    const std::vector<std::string> components = m.components();
    if (components.empty()) return "files: got no model.onnx; expected one for each component";
    for (const auto& [what, named] : {std::pair("precision", keys(m.precision)), std::pair("plugins", keys(m.plugins))}) {
        if (std::set(named.begin(), named.end()) != std::set(components.begin(), components.end())) {
            return std::string(what) + ": got " + (named.empty() ? "nothing" : join(named)) + "; expected " + join(components);
        }
    }
    const std::string *text = find(m.precision, "text_projection"), *step = find(m.precision, "denoiser");
    if (text != nullptr && step != nullptr) {
        const std::string between = contains({"int8", "fp8", "nvfp4"}, *step) ? "fp16" : *step;  // whose layers alone are quantized
        if (*text != between) {
            return "precision: got " + *text + " for text_projection and " + *step + " for denoiser; expected " + between +
                   " for the first, since the second reads what it wrote";
        }
    }
    const bool has_table = m.file(kTokenTableName) != nullptr;
    const std::string rows = "token_table_rows: got " + std::to_string(m.token_table_rows);
    if ((m.token_table_rows > 0) != has_table) {
        return rows + " and " + (has_table ? "a" : "no") + " file " + kTokenTableName + "; expected both or neither";
    }
    if (has_table && !contains(components, "text_encoder")) return rows + " without a text encoder; expected none";
    for (const std::string& component : components) {
        std::vector<std::string> missing;
        for (const std::string& target : m.targets) {
            if (m.engine_name(component, target) == nullptr) missing.push_back(target);
        }
        if (!missing.empty()) return "files: no engine of " + component + " for " + join(missing) + ", though targets names it";
    }
    return "";
}

}  // namespace

const std::vector<std::string>& component_names() {
    static const std::vector<std::string> names = {"text_encoder", "text_projection", "denoiser", "decoder"};
    return names;
}

std::string graph_name(std::string_view component) { return std::string(component) + "/model.onnx"; }

std::vector<std::string> engine_targets(std::string_view name) {
    constexpr std::string_view kSuffix = ".engine";
    name = name.substr(name.rfind('/') + 1);
    if (!name.ends_with(kSuffix) || name.size() == kSuffix.size()) return {};
    name.remove_suffix(kSuffix.size());
    std::vector<std::string> out;
    while (true) {
        const std::size_t dash = name.find('-');
        out.emplace_back(name.substr(0, dash));
        if (dash == name.npos) return out;
        name.remove_prefix(dash + 1);
    }
}

std::vector<std::string> Manifest::components() const {
    std::vector<std::string> out;
    for (const std::string& name : component_names()) {
        if (file(graph_name(name)) != nullptr) out.push_back(name);
    }
    return out;
}

const FileEntry* Manifest::file(std::string_view name) const { return find(files, name); }

const std::string* Manifest::engine_name(std::string_view component, std::string_view target) const {
    for (const auto& [name, entry] : files) {
        if (name.starts_with(std::string(component) + "/") && contains(engine_targets(name), target)) return &name;
    }
    return nullptr;
}

Manifest parse_manifest(std::string_view data, const std::string& source) {
    const Json document = parse_json(data, source);
    if (const Json* version = document.find("schema_version")) {
        const auto* number = version->get<std::int64_t>();
        const auto* big = version->get<BigInteger>();
        const std::string oldest = std::to_string(kOldestSchema), newest = std::to_string(kNewestSchema);
        if ((number == nullptr || *number < 1) && (big == nullptr || big->digits[0] == '-')) {
            throw Failure(ErrorKind::kManifest,
                          source + ": schema_version: got " + python_repr(*version) + "; expected " + oldest + " to " + newest + ".");
        }
        if (big != nullptr || *number < kOldestSchema || *number > kNewestSchema) {
            const char* remedy =
                big != nullptr || *number > kNewestSchema ? "upgrade, or rebuild the bundle here" : "rebuild the bundle";
            throw Failure(ErrorKind::kSchemaVersion, source + ": got schema " + python_repr(*version) + ", this program reads " +
                                                         oldest + " to " + newest + ": " + remedy + ".");
        }
    }
    Reader reader;
    Manifest manifest;
    if (const std::string error = second_opinion(data); !error.empty()) {
        reader.complain_of_bytes(data, error);
    } else {
        read_manifest(reader, document, manifest);
    }
    if (reader.clean()) {
        if (const std::string wrong = inconsistency(manifest); !wrong.empty()) reader.complain({}, wrong);
    }
    reader.finish(source);
    return manifest;
}

}  // namespace sana
