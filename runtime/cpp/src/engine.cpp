#include "sana/engine.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <thread>

#include "backend_choice.hpp"
#include "bundle.hpp"
#include "failure.hpp"
#include "ort_backend.hpp"
#include "picture_info.hpp"
#include "prompt.hpp"
#include "python_text.hpp"
#include "request.hpp"

namespace sana {
namespace {

constexpr const char* kTokenizer = "tokenizer/tokenizer.json";

// Clamped, scaled to 0..255 and rounded half to even, in float32, as runtime.image.to_images does it.
std::vector<std::uint8_t> to_pixels(const Tensor& decoded) {
    const std::vector<float>& values = decoded.floats();
    const auto bad = std::count_if(values.begin(), values.end(), [](float value) { return !std::isfinite(value); });
    if (bad != 0) {
        throw Failure(ErrorKind::kSana,
                      "decoder: got " + std::to_string(bad) +
                          " pixels that are not finite numbers; expected none. A precision is too narrow for this model: "
                          "rebuild with --precision bf16 or fp32.");
    }
    const std::size_t plane = values.size() / 3;
    std::vector<std::uint8_t> out(values.size());
    for (std::size_t channel = 0; channel < 3; ++channel) {
        for (std::size_t i = 0; i < plane; ++i) {
            const float level = std::clamp(values[channel * plane + i] * 0.5f + 0.5f, 0.0f, 1.0f) * 255.0f;
            out[i * 3 + channel] = static_cast<std::uint8_t>(std::nearbyint(level));
        }
    }
    return out;
}

}  // namespace

struct Engine::State {
    State(const std::string& folder, const EngineOptions& options)
        : bundle(Bundle::open(folder, false)),
          backend_reason(choose_backend(options.backend, bundle)),
          backend(bundle, options.num_threads, options.low_memory, options.onnxruntime_library),
          tokenizer(verified(options.verify), bundle.manifest.prompt) {}

    std::string verified(bool verify) const {  // the tokenizer's path, once what is opened of the bundle is known to be right
        if (verify) {
            std::vector<std::string> names = backend.files();
            names.insert(names.begin(), kTokenizer);
            bundle.verify(names);
        }
        return bundle.file(kTokenizer);
    }

    Pictures draw(const Request& request) {
        const CheckedRequest checked = check_request(bundle.manifest, request);
        Pictures out;
        std::vector<Job> jobs;
        const bool guided = checked.guidance_weights().size() == 2;
        for (std::size_t i = 0; i < checked.prompts.size(); ++i) {  // first, so that a prompt that is cut is known before the work
            Job& job = jobs.emplace_back();
            job.index = i;
            if (guided) job.texts.push_back(tokenizer.encode(checked.negative_prompts[i], true, out.warnings));
            job.texts.push_back(tokenizer.encode(checked.prompts[i], false, out.warnings));
        }
        if (working == std::this_thread::get_id()) {
            throw Failure(ErrorKind::kSana,
                          "SanaEngine was called from its own on_step. Let the request end first, or use a second engine.");
        }
        const std::lock_guard held(lock);
        const Working mark(working);
        const int per_picture = static_cast<int>(checked.schedule.table.size()),
                  total = per_picture * static_cast<int>(jobs.size());
        const Drawer drawer{bundle.manifest.model, bundle.digest, backend_name, backend.device};
        for (const Job& job : jobs) {
            const int before = static_cast<int>(job.index) * per_picture;
            const Tensor decoded = backend.draw(checked, job, [&](int step, std::span<const float> latents) {
                if (request.on_step && !request.on_step(before + step, total, latents)) {
                    throw Failure(ErrorKind::kCancelled,
                                  "cancelled after step " + std::to_string(before + step) + " of " + std::to_string(total) + ".");
                }
            });
            out.images.push_back({static_cast<int>(checked.width), static_cast<int>(checked.height), to_pixels(decoded),
                                  picture_info(checked, job.index, drawer)});
        }
        return out;
    }

    struct Working {  // which thread draws, so that a call from its own callback does not wait for itself
        explicit Working(std::atomic<std::thread::id>& to) : at(to) { at = std::this_thread::get_id(); }
        ~Working() { at = std::thread::id(); }
        std::atomic<std::thread::id>& at;
    };

    Bundle bundle;
    std::string backend_name = "onnxruntime", backend_reason;
    OrtBackend backend;
    PromptTokenizer tokenizer;
    std::mutex lock;
    std::atomic<std::thread::id> working;
};

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

Result<Engine> Engine::open(const std::string& bundle, const EngineOptions& options) {
    return guard([&] { return Engine(std::make_unique<State>(bundle, options)); });
}

Result<Pictures> Engine::generate(const Request& request) {
    return guard([&] { return state_->draw(request); });
}

const std::string& Engine::backend() const { return state_->backend_name; }
const std::string& Engine::backend_reason() const { return state_->backend_reason; }
const std::string& Engine::device() const { return state_->backend.device; }
const std::string& Engine::bundle_digest() const { return state_->bundle.digest; }

}  // namespace sana
