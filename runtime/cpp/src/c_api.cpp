#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "failure.hpp"
#include "sana.h"
#include "sana/engine.hpp"

struct sana_engine {
    sana::Engine engine;
};
struct sana_pictures {
    sana::Pictures pictures;
};
struct sana_canceller {
    std::stop_source source;
};
struct sana_error {
    sana::Error error;
};

namespace {

using sana::ErrorKind;
using sana::Failure;

sana_error out_of_memory{{ErrorKind::kSana, "out of memory. Draw a smaller picture, or free some memory."}};  // needs none itself

// Runs what may throw, and turns everything that comes out of it into an error.
template <class Work>
sana_error* contained(Work work) noexcept {
    try {
        auto result = sana::guard([&] {
            work();
            return true;
        });
        return result ? nullptr : new sana_error{result.error()};
    } catch (...) {
        return &out_of_memory;
    }
}

template <class T>
T&& valued(sana::Result<T>&& result) {
    if (!result) throw Failure(result.error().kind, result.error().message);
    return std::move(*result);
}

void require(const void* pointer, const char* name) {
    if (pointer == nullptr) throw Failure(ErrorKind::kRequest, std::string(name) + ": got NULL; expected a pointer.");
}

template <class T>
void clear(T** out) {
    require(out, "out");
    *out = nullptr;
}

template <class T>
void require_size(const T& options, const char* name) {
    if (options.struct_size != sizeof(T)) {
        throw Failure(ErrorKind::kRequest, std::string(name) + ".struct_size: got " + std::to_string(options.struct_size) +
                                               "; expected " + std::to_string(sizeof(T)) +
                                               ". Fill it with its _init function, of the library that is loaded.");
    }
}

const sana::Image* image_at(const sana_pictures* pictures, size_t index) {
    return pictures != nullptr && index < pictures->pictures.images.size() ? &pictures->pictures.images[index] : nullptr;
}

sana::OnStep callback_of(sana_on_step on_step, void* user) {
    if (on_step == nullptr) return {};
    return [on_step, user](int step, int total, std::span<const float> latents) {
        return on_step(user, step, total, latents.data(), latents.size()) != 0;
    };
}

sana_pictures* one_picture(sana::Image image) {
    auto out = std::make_unique<sana_pictures>();
    out->pictures.images.push_back(std::move(image));
    return out.release();
}

sana::Request request_of(const sana_request& from) {
    sana::Request out;
    for (size_t i = 0; i < from.num_prompts; ++i) {
        require(from.prompts, "prompts");
        require(from.prompts[i], "prompts");
        out.prompts.emplace_back(from.prompts[i]);
    }
    if (from.negative_prompt != nullptr) out.negative_prompts = {from.negative_prompt};
    out.seeds = {from.seed};
    if (from.steps != 0) out.steps = from.steps;
    if (!std::isnan(from.guidance)) out.guidance = from.guidance;
    if (from.width != 0) out.width = from.width;
    if (from.height != 0) out.height = from.height;
    if (from.scheduler != nullptr) out.scheduler = from.scheduler;
    if (from.canceller != nullptr) out.cancel = from.canceller->source.get_token();
    if (from.schedule_file != nullptr) out.schedule_file = from.schedule_file;
    out.on_step = callback_of(from.on_step, from.user);
    return out;
}

}  // namespace

void sana_engine_options_init(sana_engine_options* options) {
    if (options != nullptr) *options = {sizeof(sana_engine_options), "auto", 1, 0, 0, nullptr, 1, nullptr, nullptr, nullptr};
}

void sana_request_init(sana_request* request) {
    if (request == nullptr) return;
    *request = {};
    request->struct_size = sizeof(sana_request);
    request->guidance = std::numeric_limits<double>::quiet_NaN();
}

sana_error* sana_engine_open(const char* bundle, const sana_engine_options* options, sana_engine** out) {
    return contained([&] {
        clear(out);
        require(bundle, "bundle");
        sana::EngineOptions wanted;
        if (options != nullptr) {
            require_size(*options, "sana_engine_options");
            if (options->backend != nullptr) wanted.backend = options->backend;
            wanted.verify = options->verify != 0;
            wanted.num_threads = options->num_threads;
            wanted.low_memory = options->low_memory != 0;
            if (options->onnxruntime_library != nullptr) wanted.onnxruntime_library = options->onnxruntime_library;
            wanted.cuda_graphs = options->cuda_graphs != 0;
            if (options->tensorrt_library != nullptr) wanted.tensorrt_library = options->tensorrt_library;
            if (options->plugins_library != nullptr) wanted.plugins_library = options->plugins_library;
            if (options->kernel_cache != nullptr) wanted.kernel_cache = options->kernel_cache;
        }
        *out = new sana_engine{valued(sana::Engine::open(bundle, wanted))};
    });
}

void sana_engine_close(sana_engine* engine) { delete engine; }

sana_error* sana_generate(sana_engine* engine, const sana_request* request, sana_pictures** out) {
    return contained([&] {
        clear(out);
        require(engine, "engine");
        require(request, "request");
        require_size(*request, "sana_request");
        *out = new sana_pictures{valued(engine->engine.generate(request_of(*request)))};
    });
}

sana_error* sana_replay(sana_engine* engine, const char* info, sana_on_step on_step, void* user, const sana_canceller* canceller,
                        sana_pictures** out) {
    return contained([&] {
        clear(out);
        require(engine, "engine");
        require(info, "info");
        const std::stop_token cancel = canceller != nullptr ? canceller->source.get_token() : std::stop_token();
        *out = one_picture(valued(engine->engine.replay(info, callback_of(on_step, user), cancel)));
    });
}

sana_error* sana_apply_lora(sana_engine* engine, const char* path, double scale) {
    return contained([&] {
        require(engine, "engine");
        require(path, "path");
        if (const auto error = engine->engine.apply_lora(path, scale)) throw Failure(error->kind, error->message);
    });
}

sana_canceller* sana_canceller_new() {
    try {
        return new sana_canceller;
    } catch (...) {
        return nullptr;
    }
}

void sana_cancel(sana_canceller* canceller) {
    if (canceller != nullptr) canceller->source.request_stop();
}

void sana_canceller_free(sana_canceller* canceller) { delete canceller; }

sana_error* sana_picture_read(const char* path, sana_pictures** out) {
    return contained([&] {
        clear(out);
        require(path, "path");
        *out = one_picture(valued(sana::read_png(path)));
    });
}

size_t sana_pictures_count(const sana_pictures* pictures) { return pictures == nullptr ? 0 : pictures->pictures.images.size(); }

const uint8_t* sana_picture_pixels(const sana_pictures* pictures, size_t index, int* width, int* height) {
    const sana::Image* image = image_at(pictures, index);
    if (image == nullptr) return nullptr;
    if (width != nullptr) *width = image->width;
    if (height != nullptr) *height = image->height;
    return image->pixels.data();
}

const char* sana_picture_info(const sana_pictures* pictures, size_t index) {
    const sana::Image* image = image_at(pictures, index);
    return image == nullptr ? nullptr : image->info.c_str();
}

sana_error* sana_picture_save(const sana_pictures* pictures, size_t index, const char* path) {
    return contained([&] {
        require(path, "path");
        require(image_at(pictures, index), "picture");
        valued(sana::save_png(*image_at(pictures, index), path));
    });
}

size_t sana_pictures_num_warnings(const sana_pictures* pictures) {
    return pictures == nullptr ? 0 : pictures->pictures.warnings.size();
}

const char* sana_pictures_warning(const sana_pictures* pictures, size_t index) {
    return index < sana_pictures_num_warnings(pictures) ? pictures->pictures.warnings[index].c_str() : nullptr;
}

void sana_pictures_free(sana_pictures* pictures) { delete pictures; }

const char* sana_error_kind(const sana_error* error) { return error == nullptr ? "" : sana::kind_name(error->error.kind).data(); }
const char* sana_error_message(const sana_error* error) { return error == nullptr ? "" : error->error.message.c_str(); }
void sana_error_free(sana_error* error) {
    if (error != &out_of_memory) delete error;
}
