// The C API where memory runs out: each call once more with its 1st, 2nd, 3rd … allocation failing, alone or with all that follow.
// `no_memory BUNDLE PICTURE.png FOLDER`. Whatever fails, an error comes back, and nothing crashes.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <string>

#include "sana.h"

namespace {

std::atomic<long> left = -1;  // allocations that succeed; -1: all
std::atomic<bool> only_one = true, failed = false;

void* allocated(std::size_t size) {
    long now = left.load();
    while (now >= 0 && !left.compare_exchange_weak(now, now == 0 && !only_one ? 0 : now - 1)) {
    }
    if (now == 0) {
        failed = true;
        return nullptr;
    }
    return std::malloc(size == 0 ? 1 : size);
}

}  // namespace

void* operator new(std::size_t size) {
    if (void* out = allocated(size)) return out;
    throw std::bad_alloc();
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return allocated(size); }
void* operator new[](std::size_t size) { return operator new(size); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return allocated(size); }
void operator delete(void* pointer) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t) noexcept { std::free(pointer); }
void operator delete[](void* pointer) noexcept { std::free(pointer); }
void operator delete[](void* pointer, std::size_t) noexcept { std::free(pointer); }

namespace {

using Call = std::function<sana_error*()>;

// How many allocations it makes. `call` ends with the error of the kind `usually`, or none, where nothing fails.
long starved(const char* name, const char* usually, const Call& call) {
    long first = 0, out_of_memory = 0;
    for (const bool one : {true, false}) {
        for (long count = 0;; ++count) {
            only_one = one;
            failed = false;
            left = count;
            sana_error* error = call();
            left = -1;
            const std::string kind = sana_error_kind(error), message = sana_error_message(error);
            sana_error_free(error);
            if (!failed) {
                if (kind != usually) {
                    std::fprintf(stderr, "%s: got %s: %s; expected %s\n", name, kind.c_str(), message.c_str(), usually);
                    std::exit(1);
                }
                first = count;
                break;
            }
            // what is cached, or may be left out, can do without
            if (error != nullptr && message.empty()) std::exit(1);
            out_of_memory += message.starts_with("out of memory");
        }
    }
    if (out_of_memory == 0) std::exit(1);
    return first;
}

}  // namespace

int main(int, char** argv) {
    const char *bundle = argv[1], *picture = argv[2], *folder = argv[3];
    const std::string out = std::string(folder) + "/x.png";
    sana_engine_options options;
    sana_engine_options_init(&options);
    options.verify = 0;  // digests are computed by threads, whose start may fail with an error of their own
    const Call open = [&] {
        sana_engine* engine = nullptr;
        sana_error* error = sana_engine_open(bundle, &options, &engine);
        if ((error == nullptr) != (engine != nullptr)) std::exit(1);
        sana_engine_close(engine);
        return error;
    };
    sana_engine* engine = nullptr;
    if (sana_engine_open(bundle, &options, &engine) != nullptr) return 1;
    sana_request request;
    sana_request_init(&request);
    const char* prompts[] = {"a cat on a mat", "another one"};
    request.prompts = prompts;
    request.num_prompts = 2;
    sana_canceller* cancelled = sana_canceller_new();
    sana_cancel(cancelled);
    request.canceller = cancelled;  // so that all is done but the drawing
    sana_pictures* pictures = nullptr;
    if (sana_picture_read(picture, &pictures) != nullptr) return 1;
    const std::string info = sana_picture_info(pictures, 0);
    std::printf("open %ld\n", starved("open", "", open));
    std::printf("generate %ld\n", starved("generate", "Cancelled", [&] {
                    sana_pictures* none = nullptr;
                    return sana_generate(engine, &request, &none);
                }));
    std::printf("replay %ld\n", starved("replay", "Cancelled", [&] {
                    sana_pictures* none = nullptr;
                    return sana_replay(engine, info.c_str(), nullptr, nullptr, cancelled, &none);
                }));
    std::printf("read %ld\n", starved("read", "", [&] {
                    sana_pictures* read = nullptr;
                    sana_error* error = sana_picture_read(picture, &read);
                    sana_pictures_free(read);
                    return error;
                }));
    std::printf("save %ld\n", starved("save", "", [&] { return sana_picture_save(pictures, 0, out.c_str()); }));
    std::printf("lora %ld\n", starved("lora", "RequestError", [&] { return sana_apply_lora(engine, "x.safetensors", 1); }));
    std::printf("nothing %ld\n", starved("nothing", "MissingFileError", [&] {
                    sana_engine* none = nullptr;
                    return sana_engine_open("/nothing", nullptr, &none);
                }));
    sana_pictures_free(pictures);
    sana_canceller_free(cancelled);
    sana_engine_close(engine);
}
