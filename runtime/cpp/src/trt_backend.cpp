#include "trt_backend.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "backend_choice.hpp"
#include "failure.hpp"
#include "levels.hpp"
#include "python_text.hpp"
#include "sana/engine.hpp"
#include "timings.hpp"

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

std::vector<std::string> engine_names(const Bundle& bundle, const DeviceInfo& device) {  // in the order of components
    std::vector<std::string> out;
    for (const std::string& component : bundle.manifest.components()) {
        out.push_back(*bundle.manifest.engine_name(component, device.sm()));
    }
    return out;
}

std::vector<std::string> opened_files(const Bundle& bundle, const DeviceInfo& device) {  // engines first
    std::vector<std::string> out = engine_names(bundle, device);
    if (bundle.manifest.token_table_rows > 0) out.emplace_back(kTokenTableName);
    return out;
}

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle, const EngineOptions& options, const EngineParts::Files& files) {
    const DeviceInfo device = [&] {
        // The driver takes as long to look for GPUs as the linker takes for TensorRT. What either has to complain of is found again
        // below, each in its turn.
        const auto initialize = reinterpret_cast<int (*)(unsigned)>(driver_function("cuInit"));
        const std::jthread looking([initialize] { initialize(0); });
        trt::map_library(options.tensorrt_library);
        timings::tell_part("TensorRT's library mapped");
        return device_info();
    }();
    timings::tell_part("GPU found");
    require_engines(bundle, device.sm());
    const trt::Library& library = trt::library(options.tensorrt_library);
    check_tensorrt(bundle, trt::kFlavor, library.version);
    files(opened_files(bundle, device));
    std::vector<std::string> ops;
    for (const auto& [component, plugins] : bundle.manifest.plugins) {
        for (const auto& [op, version] : plugins) ops.push_back(op);
    }
    std::jthread linking;  // until the backend is made, which makes CUDA's context
    if (!ops.empty()) {
        const std::string plugins = trt::load_plugins(library, options.plugins_library);
        Cuda::find_functions();  // else it would wait for the linker
        linking = std::jthread([ops, plugins] {
            trt::open_libraries_of(ops, plugins);
            timings::tell_part("libraries of plugins mapped");
        });
    }
    return std::make_unique<TrtBackend>(bundle, device, library, options.kernel_cache.value_or(usual_kernel_folder()),
                                        TrtBackend::Options{options.cuda_graphs, options.low_memory});
}

TrtBackend::TrtBackend(const Bundle& bundle, const DeviceInfo& device, const trt::Library& library, std::string kernel_folder,
                       Options options)
    : Backend(device.name, static_cast<std::size_t>(bundle.manifest.ranges.max_batch)),
      bundle_(bundle),
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
    timings::tell_part("CUDA's context made");
    files_ = opened_files(bundle, device);
    const std::vector<std::string> components = bundle.manifest.components();  // all of them, but in what development builds
    for (std::size_t i = 0; i < components.size(); ++i) {
        const std::string &component = components[i], &name = files_[i];
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

struct TrtBackend::Loading {
    std::string component;
    std::unique_ptr<TrtSession> session;
    std::exception_ptr error;
    std::jthread thread;  // the last member: it ends before the others
};

// Those that are not there yet, each in a thread of its own.
std::vector<std::unique_ptr<TrtBackend::Loading>> TrtBackend::begin_to_load(const std::vector<std::string>& components) {
    std::vector<std::unique_ptr<Loading>> out;
    for (const std::string& component : components) {
        if (sessions_.contains(component)) continue;
        out.push_back(std::make_unique<Loading>());
        out.back()->component = component;
        out.back()->thread = std::jthread([this, each = out.back().get()] {
            const std::string& name = each->component;
            try {
                if (!paths_.contains(name)) bundle_.onnx_path(name);  // says that the bundle has not this component
                cuda_.make_current();  // of this thread
                auto tokens = name == kEncoder ? TokenTable::of(bundle_) : nullptr;
                each->session = std::make_unique<TrtSession>(paths_.at(name), library_, cuda_, arena_, kernels_, digests_.at(name),
                                                             std::move(tokens));
                timings::tell_part("engine of " + name + " loaded");
            } catch (...) {
                each->error = std::current_exception();
            }
        });
    }
    return out;
}

// If one fails, none of them stays. The error of the first component that has one, as in Python.
void TrtBackend::finish_to_load(std::vector<std::unique_ptr<Loading>> loading) {
    for (const auto& each : loading) {
        if (each->thread.joinable()) each->thread.join();
    }
    for (const auto& each : loading) {
        if (each->error == nullptr) continue;
        for (const auto& other : loading) sessions_.erase(other->component);
        std::rethrow_exception(each->error);
    }
    for (const auto& each : loading) sessions_.try_emplace(each->component, std::move(each->session));
}

void TrtBackend::load(const std::vector<std::string>& components) { finish_to_load(begin_to_load(components)); }

// A job's texts. Where engines are missing, the others load meanwhile.
Tensor TrtBackend::embedded(const Job& job) {
    if (options_.low_memory) return texts_.embed(job.texts);
    auto loading = begin_to_load(component_names());
    Tensor out;
    std::exception_ptr error;
    for (const auto& each : loading) {
        if (each->component != kEncoder) continue;
        each->thread.join();
        if (each->error == nullptr) sessions_.emplace(kEncoder, std::move(each->session));
    }
    try {
        if (sessions_.contains(kEncoder)) out = texts_.embed(job.texts);
        timings::tell_part("text encoded");
    } catch (...) {
        error = std::current_exception();
    }
    finish_to_load(std::move(loading));  // what it has to say comes first, as where all load before
    if (error != nullptr) std::rethrow_exception(error);
    return out;
}

std::vector<std::uint8_t> TrtBackend::draw(const CheckedRequest& request, const Job& job, const Watch& watch) {
    cuda_.make_current();
    const auto settle = [this] {  // also after an error: buffers are used again by whoever comes next
        cuda_.synchronize();
        for (const auto& [name, each] : slots_) each->settled();
    };
    try {
        std::vector<std::uint8_t> drawn = draw_now(request, job, watch);
        timings::tell_part("pixels read");
        for (const auto& [name, each] : sessions_) each->save_kernels();
        timings::tell_part("kernels kept");
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

std::vector<std::uint8_t> TrtBackend::draw_now(const CheckedRequest& request, const Job& job, const Watch& watch) {
    const Tensor embeds = embedded(job);
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

    const Shapes pixels = decoder.prepare({{"latents", shape}});
    Addresses decoded;
    for (const auto& [name, made] : pixels) decoded[name] = slot(name).reserve(decoder.output_size(name, made));
    for (const char* name : {"latents", "previous", "noise"}) shapes[name] = shape;
    shapes["coefficients"] = {static_cast<std::int64_t>(kCoefficients)};
    denoiser.prepare(shapes);
    timings::tell_part("shapes set");

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
        Addresses decode = decoded;
        decode["latents"] = state[num_steps % 2][0]->address();
        decoder.launch(decode);
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
        for (const auto& [name, address] : decoded) add(address);
        for (const Address each : {embeds_address, table, arena_.address()}) add(each);
        loop = loops_.get(key, [&] { queue(false); });
    }
    if (loop == nullptr) {
        queue(true);
        timings::tell_part("work queued");
    } else {
        *static_cast<volatile float*>(steps_done_) = 0;
        cuda_.launch_graph(loop);
        follow(num_steps, watch);
    }
    // The one wait.
    if (!pixels.contains(kLevels)) {  // of an engine of before
        const Shape& images = pixels.at("images");
        return to_levels({images, slot("images").read<float>(elements(images))});
    }
    std::int64_t bad = 0;
    for (const std::int32_t each : slot(kNotFinite).read<std::int32_t>(elements(pixels.at(kNotFinite)))) bad += each;
    if (bad != 0) throw not_finite(bad);
    return slot(kLevels).read<std::uint8_t>(elements(pixels.at(kLevels)));
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
