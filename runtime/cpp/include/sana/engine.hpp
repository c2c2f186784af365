// A bundle and a prompt become a picture.
//
//     auto engine = sana::Engine::open("out/sana-tiny");
//     if (!engine) return fail(engine.error());
//     auto pictures = engine->generate({.prompts = {"a red apple on a yellow background"}, .seeds = {7}});
//     if (!pictures) return fail(pictures.error());
//     sana::save_png(pictures->images[0], "apple.png");
//
// The same request gives the same bytes, whatever ran before it. As runtime.SanaEngine in Python.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <vector>

#include "sana/error.hpp"
#include "sana/export.h"

namespace sana {

struct EngineOptions {
    std::string backend = "auto";     // or tensorrt, onnxruntime
    bool verify = true;               // compare the SHA-256 of every file that the backend opens
    int num_threads = 0;              // of ONNX Runtime; 0: all that this process may use
    // The text encoder is unloaded after use, and loaded for the next text; on a GPU the others make room for it.
    bool low_memory = false;
    std::string onnxruntime_library;  // libonnxruntime.so; "": $SANA_ONNXRUNTIME, or what the build found
    // Of TensorRT:
    bool cuda_graphs = true;       // all of a picture's steps are one launch, from the second of a size on, and a text is one
    std::string tensorrt_library;  // libtensorrt_rtx.so or libnvinfer.so; "": $SANA_TENSORRT, or what the build or the system finds
    std::string plugins_library;   // libsana_plugins.so; "": $SANA_PLUGINS, or the one beside this library
    // The folder where kernels that TensorRT for RTX compiled are kept for the next start, of Python too; "": none; left out:
    // `kernels` in $SANA_CACHE_DIR or ~/.cache/sana.
    std::optional<std::string> kernel_cache;
};

// After each step, counted from 1 over all pictures of the request. latents: (B, C, h, w) of the B pictures that are drawn in one go,
// valid during the call. Returning false cancels the request, whose result is then an error of the kind kCancelled; the engine stays
// usable. Must not throw.
using OnStep = std::function<bool(int step, int total, std::span<const float> latents)>;

struct Request {
    std::vector<std::string> prompts;           // UTF-8; one picture each
    std::vector<std::string> negative_prompts;  // none; one for all; or one each
    std::vector<std::uint64_t> seeds = {0};     // one: of the first picture, the next ones get the next integers; or one each
    // What is left out comes from the bundle.
    std::optional<long> steps;          // 1 to 1000
    std::optional<double> guidance;     // 0 to 100; 1 and below use the prompt alone
    std::optional<long> width, height;  // px, multiples of 32 within the bundle's range
    std::optional<std::string> scheduler;
    std::optional<std::string> schedule_file;  // in place of a scheduler: a YAML file, docs/runtime.md; `steps` replace its own
    OnStep on_step;
    // std::stop_source::request_stop() from any thread cancels the request: at once while it waits for others, else after the step
    // in progress; after the pictures in progress where these are one CUDA graph, which nothing stops.
    std::stop_token cancel;
};

struct Image {
    int width = 0, height = 0;         // px
    std::vector<std::uint8_t> pixels;  // (height, width, 3), RGB
    std::string info;                  // JSON: how it was drawn; goes into the PNG
};

struct Pictures {
    std::vector<Image> images;          // in the order of the prompts
    std::vector<std::string> warnings;  // of prompts that were cut, and of kernels that cannot be kept
};

// One engine, many threads: any thread may call `generate` at any time. Requests are drawn one at a time, in the order in which
// they came. A request's callback runs in the thread that asked, and must not ask the same engine for more.
class SANA_EXPORT Engine {
  public:
    static Result<Engine> open(const std::string& bundle, const EngineOptions& options = {});
    Engine(Engine&&) noexcept;
    Engine& operator=(Engine&&) noexcept;
    ~Engine();  // as close(); requests that wait elsewhere may outlive it, calls that begin later may not

    Result<Pictures> generate(const Request& request);

    // Draw a picture again from its info: the same pixels on the same device. Refused with a RequestError if it came from another
    // bundle or backend.
    Result<Image> replay(const std::string& info, const OnStep& on_step = {}, const std::stop_token& cancel = {});

    // Frees what draws, after the request in progress. Requests that wait, and later ones, are refused. From any thread, also from
    // a callback, where it does not wait.
    void close();

    // Reserved: refused with a RequestError, for engines cannot change their weights yet.
    std::optional<Error> apply_lora(const std::string& path, double scale = 1.0);

    const std::string& backend() const;         // what draws
    const std::string& backend_reason() const;  // why that
    const std::string& device() const;          // in words
    const std::string& bundle_digest() const;

  private:
    friend struct EngineParts;
    struct State;
    explicit Engine(std::shared_ptr<State> state);
    std::shared_ptr<State> state_;
};

// A PNG file with the image's info, equal to what the Python runtime writes for the same pixels and info.
SANA_EXPORT std::vector<std::uint8_t> png_bytes(const Image& image);
// Appears whole or not at all; missing folders are made. Returns the path.
SANA_EXPORT Result<std::string> save_png(const Image& image, const std::string& path);
// What save_png wrote, or another program wrote again: 8 bits a channel, RGB or RGBA, not interlaced, with its info.
SANA_EXPORT Result<Image> read_png(const std::string& path);

}  // namespace sana
