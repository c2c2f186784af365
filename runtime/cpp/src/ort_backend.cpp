#include "ort_backend.hpp"

#include "levels.hpp"
#include "ort_session.hpp"

namespace sana {

OpenSession ort_sessions(const Bundle& bundle, int num_threads, std::string library) {
    return [&bundle, num_threads, library = std::move(library)](const std::string& component) {
        auto tokens = component == "text_encoder" ? TokenTable::of(bundle) : nullptr;
        return std::make_unique<OrtSession>(bundle.onnx_path(component), num_threads, library, std::move(tokens));
    };
}

OrtBackend::OrtBackend(const Bundle& bundle, OpenSession open, bool low_memory)
    : Backend(cpu_name(), 1),  // a larger batch is no faster on a CPU, and would let its size decide the last bits
      bundle_(bundle),
      open_(std::move(open)),
      low_memory_(low_memory),
      texts_([this](const Tensor& ids, const Tensor& mask) {
          Outputs outputs = session("text_encoder").run({{"input_ids", &ids}, {"attention_mask", &mask}});
          return taken(outputs, "prompt_embeds");
      }) {}

std::vector<std::string> OrtBackend::files() const {
    std::vector<std::string> out;
    for (const std::string& component : bundle_.manifest.components()) {
        for (std::string& name : bundle_.portable_files(component)) out.push_back(std::move(name));
    }
    if (bundle_.manifest.token_table_rows > 0) out.emplace_back(kTokenTableName);
    return out;
}

Session& OrtBackend::session(const std::string& component) {
    auto& held = sessions_[component];
    if (!held) held = open_(component);
    return *held;
}

std::vector<std::uint8_t> OrtBackend::draw(const CheckedRequest& request, const Job& job, const Watch& watch) {
    Session& denoiser = session("denoiser");
    const Tensor embeds = texts_.embed(job.texts);
    Outputs projected = session("text_projection").run({{"prompt_embeds", &embeds}});
    if (low_memory_) sessions_.erase("text_encoder");
    const auto num_texts = static_cast<std::int64_t>(job.texts.size());

    const Tensor mask{{num_texts, 1, bundle_.manifest.prompt.max_sequence_length}, prompt_mask(job)};
    const std::vector<float> weights = request.guidance_weights();
    const Tensor guidance_weights{{static_cast<std::int64_t>(weights.size())}, weights};
    const Tensor guidance_scale{{1}, std::vector<float>{static_cast<float>(request.guidance)}};

    const std::int64_t channels = bundle_.manifest.latents.channels;
    const std::vector<std::int64_t> shape = {1, channels, request.height / kPxPerLatent, request.width / kPxPerLatent};
    const auto count = static_cast<std::size_t>(shape[1] * shape[2] * shape[3]);
    const Tensor zero{shape, std::vector<float>(count)};
    Tensor latents{shape, noise_of(request, job, count, 0)}, previous = zero;
    for (std::size_t step = 0; step < request.schedule.table.size(); ++step) {
        const auto& row = request.schedule.table[step];
        const Tensor coefficients{{static_cast<std::int64_t>(row.size())}, std::vector<float>(row.begin(), row.end())};
        const bool noisy = request.schedule.needs_noise(step);
        const Tensor noise = noisy ? Tensor{shape, noise_of(request, job, count, static_cast<std::uint32_t>(step) + 1)} : Tensor{};
        Inputs inputs = {{"latents", &latents},           {"previous", &previous},
                         {"coefficients", &coefficients}, {"noise", noisy ? &noise : &zero},
                         {"prompt_mask", &mask},   {"guidance_weights", &guidance_weights}};
        for (const auto& [name, tensor] : projected) inputs[name] = &tensor;
        if (request.guidance_embeds) inputs["guidance_scale"] = &guidance_scale;
        Outputs outputs = denoiser.run(inputs);
        latents = taken(outputs, "next_latents");
        previous = taken(outputs, "prediction");
        watch.after_step(static_cast<int>(step) + 1, watch.latents ? latents.floats() : std::span<const float>());
    }
    Outputs decoded = session("decoder").run({{"latents", &latents}});
    return to_levels(taken(decoded, "images"));
}

}  // namespace sana
