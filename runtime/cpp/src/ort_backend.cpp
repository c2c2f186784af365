#include "ort_backend.hpp"

#include "failure.hpp"
#include "noise.hpp"
#include "ort_session.hpp"

namespace sana {
namespace {

constexpr std::size_t kTextsKept = 16;  // one of Gemma-2-2B is 2.8 MB

Tensor row_of(const std::vector<std::int64_t>& values) { return {{1, static_cast<std::int64_t>(values.size())}, values}; }

Tensor taken(Outputs& outputs, const std::string& name) {
    const auto found = outputs.find(name);
    if (found == outputs.end()) throw Failure(ErrorKind::kBundle, "the graph gives no " + name + ". Rebuild the bundle.");
    return std::move(found->second);
}

}  // namespace

OpenSession ort_sessions(const Bundle& bundle, int num_threads, std::string library) {
    return [&bundle, num_threads, library = std::move(library)](const std::string& component) {
        return std::make_unique<OrtSession>(bundle.onnx_path(component), num_threads, library);
    };
}

OrtBackend::OrtBackend(const Bundle& bundle, OpenSession open, bool low_memory)
    : Backend(cpu_name()), bundle_(bundle), open_(std::move(open)), low_memory_(low_memory) {}

std::vector<std::string> OrtBackend::files() const {
    std::vector<std::string> out;
    for (const std::string& component : bundle_.manifest.components()) {
        for (std::string& name : bundle_.portable_files(component)) out.push_back(std::move(name));
    }
    return out;
}

Session& OrtBackend::session(const std::string& component) {
    auto& held = sessions_[component];
    if (!held) held = open_(component);
    return *held;
}

const Tensor& OrtBackend::embed(const Text& text) {
    std::vector<std::int64_t> key = text.ids;
    key.insert(key.end(), text.mask.begin(), text.mask.end());
    for (auto each = embedded_.begin(); each != embedded_.end(); ++each) {
        if (each->first == key) {
            embedded_.splice(embedded_.begin(), embedded_, each);
            return each->second;
        }
    }
    const Tensor ids = row_of(text.ids), mask = row_of(text.mask);
    Outputs outputs = session("text_encoder").run({{"input_ids", &ids}, {"attention_mask", &mask}});
    embedded_.emplace_front(std::move(key), taken(outputs, "prompt_embeds"));
    if (embedded_.size() > kTextsKept) embedded_.pop_back();
    return embedded_.front().second;
}

Tensor OrtBackend::embed_all(const std::vector<Text>& texts) {
    Tensor out{{static_cast<std::int64_t>(texts.size())}, std::vector<float>()};
    for (const Text& text : texts) {
        const Tensor& one = embed(text);
        if (out.shape.size() == 1) out.shape.insert(out.shape.end(), one.shape.begin(), one.shape.end());
        out.floats().insert(out.floats().end(), one.floats().begin(), one.floats().end());
    }
    return out;
}

Tensor OrtBackend::draw(const CheckedRequest& request, const Job& job, const AfterStep& after_step) {
    Session& denoiser = session("denoiser");
    const Tensor embeds = embed_all(job.texts);
    Outputs projected = session("text_projection").run({{"prompt_embeds", &embeds}});
    if (low_memory_) sessions_.erase("text_encoder");
    const auto num_texts = static_cast<std::int64_t>(job.texts.size());

    Tensor prompt_mask{{num_texts, 1, bundle_.manifest.prompt.max_sequence_length}, std::vector<float>()};
    for (const Text& text : job.texts) {
        prompt_mask.floats().insert(prompt_mask.floats().end(), text.selected_mask.begin(), text.selected_mask.end());
    }
    const std::vector<float> weights = request.guidance_weights();
    const Tensor guidance_weights{{static_cast<std::int64_t>(weights.size())}, weights};
    const Tensor guidance_scale{{1}, std::vector<float>{static_cast<float>(request.guidance)}};

    const std::int64_t channels = bundle_.manifest.latents.channels;
    const std::vector<std::int64_t> shape = {1, channels, request.height / kPxPerLatent, request.width / kPxPerLatent};
    const auto count = static_cast<std::size_t>(shape[1] * shape[2] * shape[3]);
    const std::uint64_t seed = request.seeds[job.index];
    const Tensor zero{shape, std::vector<float>(count)};
    Tensor latents{shape, normal(seed, count)}, previous = zero;
    for (std::size_t step = 0; step < request.schedule.table.size(); ++step) {
        const auto& row = request.schedule.table[step];
        const Tensor coefficients{{static_cast<std::int64_t>(row.size())}, std::vector<float>(row.begin(), row.end())};
        const bool noisy = request.schedule.needs_noise(step);
        const Tensor noise = noisy ? Tensor{shape, normal(seed, count, static_cast<std::uint32_t>(step) + 1)} : Tensor{};
        Inputs inputs = {{"latents", &latents},           {"previous", &previous},
                         {"coefficients", &coefficients}, {"noise", noisy ? &noise : &zero},
                         {"prompt_mask", &prompt_mask},   {"guidance_weights", &guidance_weights}};
        for (const auto& [name, tensor] : projected) inputs[name] = &tensor;
        if (request.guidance_embeds) inputs["guidance_scale"] = &guidance_scale;
        Outputs outputs = denoiser.run(inputs);
        latents = taken(outputs, "next_latents");
        previous = taken(outputs, "prediction");
        after_step(static_cast<int>(step) + 1, latents.floats());
    }
    Outputs decoded = session("decoder").run({{"latents", &latents}});
    return taken(decoded, "images");
}

}  // namespace sana
