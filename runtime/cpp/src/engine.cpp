#include "sana/engine.hpp"

#include <future>
#include <memory>
#include <mutex>

#include "backend_choice.hpp"
#include "engine_parts.hpp"
#include "failure.hpp"
#include "picture_info.hpp"
#include "prompt.hpp"
#include "python_text.hpp"
#include "queue.hpp"
#include "request.hpp"
#include "schedule_file.hpp"
#include "timings.hpp"
#include "verification.hpp"

namespace sana {
namespace {

constexpr const char* kTokenizer = "tokenizer/tokenizer.json";

}  // namespace

struct Engine::State {
    State(Bundle opened, const EngineParts::Choose& choose, bool verify)
        : bundle(std::move(opened)), reading(std::async(std::launch::async, [this, verify] { return read_tokenizer(verify); })),
          chosen(verified(choose, verify)),
          device(chosen.backend->device),
          max_batch(chosen.backend->max_batch),
          tokenizer(reading.get()) {}

    // Gemma's takes a second, and so is read while the rest is opened. What is wrong with it is raised after what is wrong with that.
    PromptTokenizer read_tokenizer(bool verify) const {
        if (verify) bundle.verify({kTokenizer});  // no parser sees what was changed
        PromptTokenizer out(bundle.file(kTokenizer), bundle.manifest.prompt);
        timings::tell_part("tokenizer read");
        return out;
    }

    // What draws, once the tokenizer and what it opens of the bundle are known to be right.
    EngineParts::Chosen verified(const EngineParts::Choose& choose, bool verify) const {
        Verification verification(bundle);
        const auto with_tokenizer = [](std::vector<std::string> files) {
            files.insert(files.begin(), kTokenizer);
            return files;
        };
        EngineParts::Chosen out = choose(bundle, [&](const std::vector<std::string>& files) {
            if (verify) verification.begin(with_tokenizer(files));
        });
        if (verify) verification.finish(with_tokenizer(out.backend->files()));
        return out;
    }

    Pictures generate(const Request& request) {
        if (!request.schedule_file) return draw(check_request(bundle.manifest, request), request);
        if (request.scheduler) {
            throw Failure(ErrorKind::kRequest, "scheduler: got " + repr(*request.scheduler) + " beside the schedule " +
                                                   repr(*request.schedule_file) + ". Leave one of them out.");
        }
        return draw(check_request(bundle.manifest, request, read_schedule_file(*request.schedule_file, request.steps)), request);
    }

    Image replay(const std::string& text, const OnStep& on_step, const std::stop_token& cancel) {
        const PictureInfo info = parse_picture_info(text, "picture's metadata");
        const Drawer& by = info.drawer;
        if (by.bundle_digest != bundle.digest) {
            throw Failure(ErrorKind::kRequest, "bundle: the picture was drawn by " + repr(by.model) + ", bundle " +
                                                   by.bundle_digest.substr(0, 12) + "…; this is " + repr(bundle.manifest.model) +
                                                   ", bundle " + bundle.digest.substr(0, 12) +
                                                   "…. Use the bundle that it was drawn with.");
        }
        if (by.backend != chosen.name) {
            throw Failure(ErrorKind::kRequest, "backend: the picture was drawn by " + repr(by.backend) + " on " + by.device +
                                                   "; this is " + repr(chosen.name) + " on " + device +
                                                   ". Open the bundle with backend=" + repr(by.backend) + ".");
        }
        const auto largest = static_cast<std::int64_t>(max_batch);
        if (info.batch_index >= info.batch_size || info.batch_size > largest) {
            throw Failure(ErrorKind::kRequest, "batch: got picture " + std::to_string(info.batch_index) + " of " +
                                                   std::to_string(info.batch_size) + "; expected one of at most " +
                                                   std::to_string(largest) + ".");
        }
        Request request;
        const auto count = static_cast<std::size_t>(info.batch_size);  // in a batch as large as it was the first time
        request.prompts.assign(count, info.prompt);
        request.negative_prompts = {info.negative_prompt};
        request.seeds.assign(count, info.seed);
        request.guidance = info.guidance;
        request.width = info.width;
        request.height = info.height;
        request.on_step = on_step;
        request.cancel = cancel;
        Pictures drawn = draw(check_request(bundle.manifest, request, make_schedule(info.recipe)), request);
        return std::move(drawn.images[static_cast<std::size_t>(info.batch_index)]);
    }

    Pictures draw(const CheckedRequest& checked, const Request& request) {
        Pictures out;
        const std::vector<Job> jobs = jobs_of(checked, out.warnings);
        const Queue::Turn turn = queue.wait(request.cancel);
        const int per_job = static_cast<int>(checked.schedule.table.size()), total = per_job * static_cast<int>(jobs.size());
        const Drawer drawer{bundle.manifest.model, bundle.digest, chosen.name, device};
        int before = 0;
        for (const Job& job : jobs) {
            const auto after_step = [&](int step, std::span<const float> latents) {
                const bool goes_on = !request.on_step || request.on_step(before + step, total, latents);
                if (!goes_on || request.cancel.stop_requested()) {
                    throw Failure(ErrorKind::kCancelled,
                                  "cancelled after step " + std::to_string(before + step) + " of " + std::to_string(total) + ".");
                }
            };
            const std::vector<std::uint8_t> levels = chosen.backend->draw(checked, job, {static_cast<bool>(request.on_step), after_step});
            for (std::string& each : chosen.backend->take_warnings()) out.warnings.push_back(std::move(each));
            const std::size_t size = levels.size() / job.size();
            for (std::size_t i = 0; i < job.size(); ++i) {
                PictureInfo info = picture_info(checked, job.first + i, drawer);
                info.batch_size = static_cast<std::int64_t>(job.size());
                info.batch_index = static_cast<std::int64_t>(i);
                const auto mine = std::span(levels).subspan(i * size, size);
                out.images.push_back({static_cast<int>(checked.width), static_cast<int>(checked.height),
                                      std::vector(mine.begin(), mine.end()), json_of(info)});
            }
            before += per_job;
        }
        return out;
    }

    // Texts are encoded first, so that a prompt that is cut is known before the work.
    std::vector<Job> jobs_of(const CheckedRequest& checked, std::vector<std::string>& warnings) const {
        std::vector<Job> jobs;
        const bool guided = checked.guidance_weights().size() == 2;
        for (std::size_t i = 0; i < checked.prompts.size(); ++i) {
            if (i % max_batch == 0) jobs.push_back({std::vector<std::vector<Text>>(guided ? 2 : 1), i});
            auto& rows = jobs.back().texts;
            if (guided) rows[0].push_back(tokenizer.encode(checked.negative_prompts[i], true, warnings));
            rows.back().push_back(tokenizer.encode(checked.prompts[i], false, warnings));
        }
        return jobs;
    }

    void close() {
        if (!queue.close()) return;
        const std::lock_guard held(freeing);  // of several that close
        chosen.backend.reset();
    }

    Bundle bundle;
    std::future<PromptTokenizer> reading;
    EngineParts::Chosen chosen;  // its backend goes when the engine is closed
    std::string device;
    std::size_t max_batch;  // of the backend, which may be gone
    PromptTokenizer tokenizer;
    Queue queue;
    std::mutex freeing;
};

Engine EngineParts::made(Bundle bundle, const Choose& choose, bool verify) {
    return Engine(std::make_shared<Engine::State>(std::move(bundle), choose, verify));
}

std::size_t EngineParts::queued(const Engine& engine) { return engine.state_->queue.length(); }

Engine::Engine(std::shared_ptr<State> state) : state_(std::move(state)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&& other) noexcept {
    if (this != &other) {
        close();
        state_ = std::move(other.state_);
    }
    return *this;
}
Engine::~Engine() { close(); }

void Engine::close() {
    if (state_) state_->close();
}

Result<Engine> Engine::open(const std::string& bundle, const EngineOptions& options) {
    return guard([&] {
        const auto choose = [&](const Bundle& opened, const EngineParts::Files& files) {
            return choose_backend(opened, options, files);
        };
        return EngineParts::made(Bundle::open(bundle, false), choose, options.verify);
    });
}

Result<Pictures> Engine::generate(const Request& request) {
    const std::shared_ptr<State> state = state_;  // which outlives an engine that goes while this waits
    return guard([&] {
        if (!state) throw closed_engine();
        return state->generate(request);
    });
}

Result<Image> Engine::replay(const std::string& info, const OnStep& on_step, const std::stop_token& cancel) {
    const std::shared_ptr<State> state = state_;
    return guard([&] {
        if (!state) throw closed_engine();
        return state->replay(info, on_step, cancel);
    });
}

std::optional<Error> Engine::apply_lora(const std::string& path, double scale) {
    return Error{ErrorKind::kRequest, "apply_lora: got " + repr(path) + " with a scale of " + repr(scale) +
                                          "; engines cannot change their weights yet. Fuse the LoRA into the checkpoint, and "
                                          "build a bundle of that."};
}

const std::string& Engine::backend() const { return state_->chosen.name; }
const std::string& Engine::backend_reason() const { return state_->chosen.reason; }
const std::string& Engine::device() const { return state_->device; }
const std::string& Engine::bundle_digest() const { return state_->bundle.digest; }

}  // namespace sana
