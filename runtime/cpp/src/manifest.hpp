// What manifest.json holds, as types. docs/bundle.md is the format's description; this is engines/manifest.py once more.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sana {

constexpr std::int64_t kOldestSchema = 2, kTableSchema = 3, kNewestSchema = 4;  // engines/manifest.py says what is new
constexpr std::size_t kMaxFiles = 10'000;
constexpr const char* kManifestName = "manifest.json";
constexpr const char* kTokenTableName = "text_encoder/token_table.safetensors";
constexpr int kPxPerLatent = 32;  // DC-AE f32: one latent cell covers 32 x 32 px

const std::vector<std::string>& component_names();  // in the order in which a picture passes through them

struct ShapeRange {
    std::int64_t min_side = 0, opt_side = 0, max_side = 0;  // px
    std::int64_t max_batch = 0;                             // images per call
    std::int64_t max_sequence_length = 0;                   // prompt tokens that the denoiser sees
};
struct TensorRTInfo {
    std::string flavor, version;
};
struct ScheduleInfo {
    std::string scheduler;
    double flow_shift = 3.0;
    std::int64_t num_inference_steps = 0;
    double guidance_scale = 0;
    double timestep_scale = 1.0;
    std::optional<double> max_timestep, intermediate_timestep;  // radians
};
struct PromptInfo {
    std::string complex_human_instruction;  // put before the prompt; "" for none
    std::int64_t max_sequence_length = 0;
    bool lowercase = true;  // lower case and strip before tokenizing
};
struct LatentInfo {
    std::int64_t channels = 0;
    double scaling_factor = 0;
};
struct FileEntry {
    std::string sha256;
    std::int64_t size = 0;  // bytes
    std::string role;
    std::vector<std::string> parts;  // SHA-256 of each 64 MiB of a larger file, so that all cores can compare it; empty: none
};

template <class T>
using Named = std::vector<std::pair<std::string, T>>;  // in the document's order

struct Manifest {
    std::int64_t schema_version = kOldestSchema;
    std::string model, model_digest, variant;
    Named<std::string> precision;  // of each component
    ShapeRange ranges;
    std::vector<std::string> targets;
    std::optional<TensorRTInfo> tensorrt;
    Named<Named<std::int64_t>> plugins;
    ScheduleInfo schedule;
    PromptInfo prompt;
    LatentInfo latents;
    bool guidance_embeds = false;
    std::int64_t caption_channels = 0;
    std::int64_t token_table_rows = 0;  // of the table in kTokenTableName; 0: it is in graph and engines
    std::string licence;
    Named<FileEntry> files;

    std::vector<std::string> components() const;                                                // those that have a graph
    const FileEntry* file(std::string_view name) const;                                         // nullptr if it is not named
    const std::string* engine_name(std::string_view component, std::string_view target) const;  // nullptr if there is none
};

// Raises SchemaVersionError for another schema, ManifestError or UnsafePathError for anything else that is wrong.
Manifest parse_manifest(std::string_view data, const std::string& source);

std::string graph_name(std::string_view component);
std::vector<std::string> engine_targets(std::string_view name);  // denoiser/sm86-sm89.engine serves both; empty for any other file

}  // namespace sana
