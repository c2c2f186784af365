#include "trt_backend.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "backend_choice.hpp"
#include "failure.hpp"
#include "python_text.hpp"
#include "sana/engine.hpp"

namespace sana {
namespace {

constexpr auto kPoll = std::chrono::microseconds(200);  // a step takes some milliseconds
constexpr std::size_t kRow = kDeviceAlignment / sizeof(float);  // from one row of the table to the next, so that each is aligned

const std::string kEncoder = "text_encoder", kProjection = "text_projection", kDenoiser = "denoiser", kDecoder = "decoder";

// A row's last number is that of the step, from 1: follow() reads it.
std::vector<float> padded(const Schedule& schedule) {
    std::vector<float> out(schedule.table.size() * kRow);
    for (std::size_t i = 0; i < schedule.table.size(); ++i) {
        std::copy(schedule.table[i].begin(), schedule.table[i].end(), out.begin() + static_cast<std::ptrdiff_t>(i * kRow));
        out[(i + 1) * kRow - 1] = static_cast<float>(i + 1);
    }
    return out;
}

std::size_t elements(const Shape& shape) {
    std::size_t count = 1;
    for (const std::int64_t each : shape) count *= static_cast<std::size_t>(each);
    return count;
}

void append_to(Loops::Key& key, const Shape& shape) {
    key.push_back(static_cast<std::int64_t>(shape.size()));
    key.insert(key.end(), shape.begin(), shape.end());
}

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle, const EngineOptions& options) {
    const DeviceInfo device = device_info();
    require_engines(bundle, device.sm());
    const trt::Library& library = trt::library(options.tensorrt_library);
    check_tensorrt(bundle, trt::kFlavor, library.version);
    const auto& plugins = bundle.manifest.plugins;  // of each component
    const bool any = std::any_of(plugins.begin(), plugins.end(), [](const auto& each) { return !each.second.empty(); });
    if (any) trt::load_plugins(library, options.plugins_library);
    return std::make_unique<TrtBackend>(bundle, device, library, options.kernel_cache.value_or(usual_kernel_folder()),
                                        TrtBackend::Options{options.cuda_graphs, options.low_memory});
}

TrtBackend::TrtBackend(const Bundle& bundle, const DeviceInfo& device, const trt::Library& library, std::string kernel_folder,
                       Options options)
    : Backend(device.name, static_cast<std::size_t>(bundle.manifest.ranges.max_batch)),
      library_(library),
      kernels_(std::move(kernel_folder), {device.name, device.sm(), device.driver_cuda, std::string(trt::kFlavor) + " " + library.version},
               [this](const std::string& what) {
                   const std::lock_guard held(warning_);
                   warnings_.push_back(what);
               }),
      options_(options),
      channels_(bundle.manifest.latents.channels),
      arena_(cuda_),
      loops_(cuda_),
      text_loops_(cuda_),
      texts_([this](const Tensor& ids, const Tensor& mask) {
          if (options_.low_memory && sessions_.contains(kDenoiser)) {  // all make room
              free_buffers();
              for (const auto& [name, each] : sessions_) each->save_kernels();
              sessions_.clear();
          }
          const bool keeps = options_.cuda_graphs && !options_.low_memory;
          Outputs outputs = session(kEncoder).run({{"input_ids", &ids}, {"attention_mask", &mask}}, keeps ? &text_loops_ : nullptr);
          return taken(outputs, "prompt_embeds");
      }) {
    for (const std::string& component : component_names()) {
        const std::string& name = *bundle.manifest.engine_name(component, device.sm());
        files_.push_back(name);
        paths_[component] = bundle.file(name);
        digests_[component] = bundle.manifest.file(name)->sha256;
    }
    steps_done_ = static_cast<float*>(cuda_.allocate_pinned(sizeof(float)));
}

TrtBackend::~TrtBackend() {
    try {
        cuda_.make_current();
        cuda_.synchronize();
        for (const auto& [name, each] : sessions_) each->save_kernels();
    } catch (const std::exception&) {  // the GPU does not answer any more: nothing of it can be saved
    }
    free_buffers();
    cuda_.free_pinned(steps_done_);
    sessions_.clear();
}

std::vector<std::string> TrtBackend::take_warnings() {
    const std::lock_guard held(warning_);
    return std::exchange(warnings_, {});
}

TrtSession& TrtBackend::session(const std::string& component) {
    load({component});
    return *sessions_.at(component);
}

// Those that are not there yet, at the same time. If one fails, none of them stays.
void TrtBackend::load(const std::vector<std::string>& components) {
    std::map<std::string, std::unique_ptr<TrtSession>> made;
    for (const std::string& component : components) {
        if (!sessions_.contains(component)) made[component] = nullptr;
    }
    std::exception_ptr error;
    std::mutex lock;
    const auto open = [&](const std::string& component, std::unique_ptr<TrtSession>& out) {
        try {
            cuda_.make_current();  // of this thread
            out = std::make_unique<TrtSession>(paths_.at(component), library_, cuda_, arena_, kernels_, digests_.at(component));
        } catch (...) {
            const std::lock_guard held(lock);
            if (error == nullptr) error = std::current_exception();
        }
    };
    {
        std::vector<std::jthread> threads;  // joined at the end of the block, also where one cannot be started
        for (auto& [component, session] : made) threads.emplace_back([&] { open(component, session); });
    }
    if (error != nullptr) std::rethrow_exception(error);
    sessions_.merge(made);
}

Tensor TrtBackend::draw(const CheckedRequest& request, const Job& job, const Watch& watch) {
    cuda_.make_current();
    const auto settle = [this] {  // also after an error: buffers are used again by whoever comes next
        cuda_.synchronize();
        for (const auto& [name, each] : slots_) each->settled();
    };
    try {
        Tensor drawn = draw_now(request, job, watch);
        for (const auto& [name, each] : sessions_) each->save_kernels();
        settle();
        return drawn;
    } catch (const Failure& failure) {
        settle();
        // Else what grew for this request would be missing to a smaller one.
        if (failure.error().kind == ErrorKind::kGpuMemory) free_buffers();
        throw;
    } catch (...) {
        settle();
        throw;
    }
}

Tensor TrtBackend::draw_now(const CheckedRequest& request, const Job& job, const Watch& watch) {
    if (!options_.low_memory) load(component_names());
    const Tensor embeds = texts_.embed(job.texts);
    if (const auto encoder = sessions_.find(kEncoder); options_.low_memory && encoder != sessions_.end()) {
        encoder->second->save_kernels();
        sessions_.erase(encoder);
    }
    load({kProjection, kDenoiser, kDecoder});
    TrtSession &projection = *sessions_.at(kProjection), &denoiser = *sessions_.at(kDenoiser), &decoder = *sessions_.at(kDecoder);

    const auto batch = static_cast<std::int64_t>(job.size()), num_texts = static_cast<std::int64_t>(job.texts.size());
    const Shape shape = {batch, channels_, request.height / kPxPerLatent, request.width / kPxPerLatent};
    const std::size_t count = elements(shape), one = count / job.size(), bytes = count * sizeof(float);
    const std::size_t num_steps = request.schedule.table.size();

    const Address embeds_address = slot("prompt_embeds").write(embeds.floats());
    const Shapes text = projection.prepare({{"prompt_embeds", embeds.shape}});
    Addresses addresses;  // of what is the same for every step
    for (const auto& [name, made] : text) addresses[name] = slot(name).reserve(projection.output_size(name, made));
    Addresses project = addresses;
    project["prompt_embeds"] = embeds_address;

    Shapes shapes = text;
    const auto fix = [&](const std::string& name, Shape of, const std::vector<float>& values) {
        addresses[name] = slot(name).write(values);
        shapes[name] = std::move(of);
    };
    const std::vector<float> weights = request.guidance_weights();
    fix("guidance_weights", {static_cast<std::int64_t>(weights.size())}, weights);
    const std::vector<float> mask = prompt_mask(job);
    fix("prompt_mask", {num_texts, batch, static_cast<std::int64_t>(mask.size()) / (num_texts * batch)}, mask);
    if (request.guidance_embeds) fix("guidance_scale", {1}, {static_cast<float>(request.guidance)});
    const std::vector<Address> noise = upload_noise(request, job, one);
    const Address table = slot("table").write(padded(request.schedule));
    DeviceBuffer* const state[2][2] = {{&slot("latents_0"), &slot("prediction_0")}, {&slot("latents_1"), &slot("prediction_1")}};
    for (const auto& pair : state) {
        for (DeviceBuffer* each : pair) each->reserve(bytes);
    }
    state[0][0]->write(noise_of(request, job, one, 0));
    cuda_.zero(state[0][1]->address(), bytes);

    const Shape pixels = decoder.prepare({{"latents", shape}}).at("images");
    DeviceBuffer& images = slot("images");
    images.reserve(decoder.output_size("images", pixels));
    for (const char* name : {"latents", "previous", "noise"}) shapes[name] = shape;
    shapes["coefficients"] = {static_cast<std::int64_t>(kCoefficients)};
    denoiser.prepare(shapes);

    // All of a picture's work after its text; steps that are done are counted for follow() where nobody waits for each.
    const auto queue = [&](bool stepwise) {
        projection.launch(project);
        for (std::size_t i = 0; i < num_steps; ++i) {
            DeviceBuffer *const *now = state[i % 2], *const *next = state[(i + 1) % 2];
            Addresses step = addresses;
            step["latents"] = now[0]->address();
            step["previous"] = now[1]->address();
            step["coefficients"] = table + i * kDeviceAlignment;
            step["noise"] = noise[i];
            step["next_latents"] = next[0]->address();
            step["prediction"] = next[1]->address();
            denoiser.launch(step);
            if (!stepwise) {
                cuda_.to_host(steps_done_, table + (i + 1) * kDeviceAlignment - sizeof(float), sizeof(float));
            } else {
                const std::vector<float> latents = watch.latents ? next[0]->read<float>(count) : std::vector<float>();
                watch.after_step(static_cast<int>(i) + 1, latents);
            }
        }
        decoder.launch({{"latents", state[num_steps % 2][0]->address()}, {"images", images.address()}});
    };

    void* loop = nullptr;
    if (options_.cuda_graphs && !watch.latents) {
        Loops::Key key = {static_cast<std::int64_t>(num_steps), static_cast<std::int64_t>(arena_.size())};
        append_to(key, shape);
        append_to(key, embeds.shape);
        for (const auto& [name, each] : text) append_to(key, each);
        const auto add = [&key](Address address) { key.push_back(static_cast<std::int64_t>(address)); };
        for (const auto& [name, address] : addresses) add(address);
        for (const Address each : noise) add(each);
        for (const auto& pair : state) {
            for (const DeviceBuffer* each : pair) add(each->address());
        }
        for (const Address each : {embeds_address, table, images.address(), arena_.address()}) add(each);
        loop = loops_.get(key, [&] { queue(false); });
    }
    if (loop == nullptr) {
        queue(true);
    } else {
        *static_cast<volatile float*>(steps_done_) = 0;
        cuda_.launch_graph(loop);
        follow(num_steps, watch);
    }
    return {pixels, images.read<float>(elements(pixels))};  // the one wait
}

// Tell of each step of a graph that runs, until all are done.
void TrtBackend::follow(std::size_t num_steps, const Watch& watch) {
    const volatile float* counter = steps_done_;
    for (std::size_t done = 0; done < num_steps;) {
        const bool idle = cuda_.idle();  // before the counter is read: what it says then is all
        for (const auto seen = static_cast<std::size_t>(*counter); done < seen;) watch.after_step(static_cast<int>(++done), {});
        if (idle) break;
        std::this_thread::sleep_for(kPoll);
    }
}

// Addresses of each step's fresh noise; of zeros where there is none. count: numbers of one picture.
std::vector<Address> TrtBackend::upload_noise(const CheckedRequest& request, const Job& job, std::size_t count) {
    const Schedule& schedule = request.schedule;
    const std::size_t row = (job.size() * count + kRow - 1) / kRow * kRow;
    std::vector<float> rows(row);  // the first one is zeros
    std::vector<std::size_t> places(schedule.table.size(), 0);
    for (std::size_t i = 0; i < places.size(); ++i) {
        if (!schedule.needs_noise(i)) continue;
        places[i] = rows.size() * sizeof(float);
        const std::vector<float> fresh = noise_of(request, job, count, static_cast<std::uint32_t>(i) + 1);
        rows.insert(rows.end(), fresh.begin(), fresh.end());
        rows.resize(places[i] / sizeof(float) + row);
    }
    const Address start = slot("noise").write(rows);
    std::vector<Address> out;
    for (const std::size_t each : places) out.push_back(start + each);
    return out;
}

DeviceBuffer& TrtBackend::slot(const std::string& name) {
    auto& held = slots_[name];
    if (held == nullptr) held = std::make_unique<DeviceBuffer>(cuda_);
    return *held;
}

void TrtBackend::free_buffers() noexcept {
    loops_.clear();  // which name the buffers
    text_loops_.clear();
    for (const auto& [name, each] : sessions_) each->free_buffers();
    slots_.clear();
    arena_.close();
}

}  // namespace sana
