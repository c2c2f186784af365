// One engine, many threads, with sessions that compute nothing: `threads BUNDLE`. Says what failed and ends with 1, or says
// nothing.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "engine_parts.hpp"
#include "ort_backend.hpp"

namespace {

using namespace sana;
using Pixels = std::vector<std::uint8_t>;

#define CHECK(what) ((what) ? void() : failed(#what, __LINE__))

[[noreturn]] void failed(const char* what, int line) {
    std::fprintf(stderr, "threads.cpp:%d: not so: %s\n", line, what);
    std::_Exit(1);
}

// The shapes of a component's outputs, and numbers that depend on its inputs. It notices two threads at once.
class FakeSession : public Session {
  public:
    FakeSession(std::string component, const Manifest& manifest) : component_(std::move(component)), manifest_(manifest) {}

    Outputs run(const Inputs& inputs) override {
        CHECK(!busy_.exchange(true));
        Outputs out = made(inputs);
        busy_ = false;
        return out;
    }

  private:
    Outputs made(const Inputs& inputs) const {
        const std::int64_t length = manifest_.prompt.max_sequence_length;
        if (component_ == "text_encoder") {
            float sum = 0;
            for (const std::int64_t id : std::get<1>(inputs.at("input_ids")->data)) sum = sum * 0.75f + static_cast<float>(id);
            return {{"prompt_embeds", {{1, length, 1}, std::vector<float>(static_cast<std::size_t>(length), sum)}}};
        }
        if (component_ == "text_projection") return {{"projected", *inputs.at("prompt_embeds")}};
        const Tensor& latents = *inputs.at("latents");
        if (component_ == "denoiser") {
            Tensor next = latents;
            for (float& each : next.floats()) each = each * 0.5f + inputs.at("projected")->floats()[0] * 0.001f;
            return {{"next_latents", next}, {"prediction", latents}};
        }
        Tensor images{{1, 3, latents.shape[2] * kPxPerLatent, latents.shape[3] * kPxPerLatent}, std::vector<float>()};
        const auto count = static_cast<std::size_t>(images.shape[1] * images.shape[2] * images.shape[3]);
        for (std::size_t i = 0; i < count; ++i) images.floats().push_back(latents.floats()[i % latents.floats().size()]);
        return {{"images", images}};
    }

    std::string component_;
    const Manifest& manifest_;
    static inline std::atomic<bool> busy_ = false;  // of all sessions: only one engine is at work in each test
};

Engine engine_of(const std::string& folder) {
    return EngineParts::made(
        Bundle::open(folder),
        [](const Bundle& bundle, const EngineParts::Files&) {
            const auto open = [&bundle](const std::string& name) { return std::make_unique<FakeSession>(name, bundle.manifest); };
            return EngineParts::Chosen{"onnxruntime", "it is a test", std::make_unique<OrtBackend>(bundle, open, false)};
        },
        false);
}

Request request_of(std::uint64_t seed, OnStep on_step = {}, std::stop_token cancel = {}) {
    Request out;
    out.prompts = {"a cat"};
    out.seeds = {seed};
    out.steps = 3;
    out.on_step = std::move(on_step);
    out.cancel = std::move(cancel);
    return out;
}

Pixels drawn(Engine& engine, const Request& request) {
    auto pictures = engine.generate(request);
    CHECK(pictures);
    return pictures->images.at(0).pixels;
}

Error refused(Engine& engine, const Request& request) {
    auto pictures = engine.generate(request);
    CHECK(!pictures);
    return pictures.error();
}

void until_queued(const Engine& engine, std::size_t count) {
    while (EngineParts::queued(engine) != count) std::this_thread::sleep_for(std::chrono::microseconds(100));
}

// A request that is in the middle of its first step until it is let go.
struct Busy {
    explicit Busy(Engine& engine)
        : thread([this, &engine] {
              pixels = drawn(engine, request_of(99, [this](int step, int, std::span<const float>) {
                                 if (step == 1) {
                                     begun.release();
                                     go_on.acquire();
                                 }
                                 return true;
                             }));
          }) {
        begun.acquire();
    }
    void let_go() {
        go_on.release();
        thread.join();
    }

    std::binary_semaphore begun{0}, go_on{0};
    Pixels pixels;
    std::thread thread;
};

void test_order(const std::string& folder) {
    Engine engine = engine_of(folder);
    for (int round = 0; round < 20; ++round) {
        Busy busy(engine);
        std::vector<std::thread> threads;
        std::vector<int> order;  // written by who has the turn
        for (int i = 0; i < 8; ++i) {
            threads.emplace_back([&, i] {
                drawn(engine, request_of(0, [&, i](int step, int, std::span<const float>) {
                          if (step == 1) order.push_back(i);
                          return true;
                      }));
            });
            until_queued(engine, static_cast<std::size_t>(i) + 2);
        }
        busy.let_go();
        for (std::thread& each : threads) each.join();
        CHECK((order == std::vector{0, 1, 2, 3, 4, 5, 6, 7}));
    }
}

void test_pixels_and_callbacks(const std::string& folder) {
    Engine engine = engine_of(folder);
    std::vector<Pixels> alone;
    for (std::uint64_t seed = 0; seed < 8; ++seed) alone.push_back(drawn(engine, request_of(seed)));
    std::vector<std::thread> threads;
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
        threads.emplace_back([&, seed] {
            for (int i = 0; i < 10; ++i) {
                std::vector<int> steps;
                const auto me = std::this_thread::get_id();
                const Pixels pixels = drawn(engine, request_of(seed, [&](int step, int total, std::span<const float> latents) {
                                                CHECK(std::this_thread::get_id() == me);
                                                CHECK(total == 3 && !latents.empty());
                                                steps.push_back(step);
                                                return true;
                                            }));
                CHECK(pixels == alone[seed]);
                CHECK((steps == std::vector{1, 2, 3}));
            }
        });
    }
    for (std::thread& each : threads) each.join();
}

void test_cancel_in_the_queue(const std::string& folder) {
    Engine engine = engine_of(folder);
    Busy busy(engine);
    std::stop_source cancel;
    std::atomic<bool> ended = false;
    std::thread waiting([&] {
        const Error error = refused(engine, request_of(1, {}, cancel.get_token()));
        CHECK(error.kind == ErrorKind::kCancelled);
        CHECK(error.message == "cancelled before it began.");
        ended = true;
    });
    until_queued(engine, 2);
    std::thread behind([&] { drawn(engine, request_of(2)); });
    until_queued(engine, 3);
    CHECK(!ended);
    cancel.request_stop();
    waiting.join();  // while the first is still busy
    CHECK(EngineParts::queued(engine) == 2);
    busy.let_go();
    behind.join();
    CHECK(refused(engine, request_of(1, {}, cancel.get_token())).kind == ErrorKind::kCancelled);  // for good
}

void test_cancel_while_it_is_drawn(const std::string& folder) {
    Engine engine = engine_of(folder);
    std::stop_source cancel;
    std::thread canceller;
    const Error error = refused(engine, request_of(
                                            1,
                                            [&](int step, int, std::span<const float>) {
                                                if (step == 2) {
                                                    canceller = std::thread([&] { cancel.request_stop(); });
                                                    canceller.join();
                                                }
                                                return true;
                                            },
                                            cancel.get_token()));
    CHECK(error.kind == ErrorKind::kCancelled && error.message == "cancelled after step 2 of 3.");
    const Error own = refused(engine, request_of(1, [](int step, int, std::span<const float>) { return step < 1; }));
    CHECK(own.kind == ErrorKind::kCancelled && own.message == "cancelled after step 1 of 3.");
    drawn(engine, request_of(1));
}

void test_a_call_from_its_own_callback(const std::string& folder) {
    Engine engine = engine_of(folder), other = engine_of(folder);
    drawn(engine, request_of(1, [&](int, int, std::span<const float>) {
              const Error error = refused(engine, request_of(2));
              CHECK(error.kind == ErrorKind::kSana && error.message.find("its own on_step") != std::string::npos);
              return true;
          }));
    Request request = request_of(1, [](int, int, std::span<const float>) -> bool { throw std::runtime_error("mine"); });
    CHECK(refused(engine, request).message.find("mine") != std::string::npos);
    drawn(engine, request_of(1));
}

void test_close(const std::string& folder) {
    for (int round = 0; round < 20; ++round) {
        auto engine = std::make_unique<Engine>(engine_of(folder));
        Busy busy(*engine);
        std::vector<std::thread> threads;
        for (int i = 0; i < 4; ++i) {
            threads.emplace_back([&] {
                const Error error = refused(*engine, request_of(1));
                CHECK(error.kind == ErrorKind::kSana && error.message == "this SanaEngine is closed. Make another one.");
            });
        }
        until_queued(*engine, 5);
        if (round % 2 == 0) {  // with requests that wait, and one that is being drawn
            std::thread closing([&] { engine.reset(); });
            for (std::thread& each : threads) each.join();
            busy.let_go();
            closing.join();
        } else {  // by several at once
            std::thread closing([&] { engine->close(); }), also([&] { engine->close(); });
            for (std::thread& each : threads) each.join();
            busy.let_go();
            closing.join();
            also.join();
            CHECK(refused(*engine, request_of(1)).message.starts_with("this SanaEngine is closed"));
            CHECK(engine->backend() == "onnxruntime");
        }
        CHECK(!busy.pixels.empty());
    }
    Engine engine = engine_of(folder);
    drawn(engine, request_of(1, [&](int, int, std::span<const float>) {
              engine.close();  // does not wait for itself
              return true;
          }));
    CHECK(refused(engine, request_of(1)).message.starts_with("this SanaEngine is closed"));
    Engine moved = engine_of(folder);
    engine = std::move(moved);
    drawn(engine, request_of(1));
    CHECK(refused(moved, request_of(1)).message.starts_with("this SanaEngine is closed"));  // NOLINT: what is left of it
}

void test_everything_at_once(const std::string& folder) {
    Engine engine = engine_of(folder);
    std::atomic<int> pictures = 0, cancelled = 0, closed = 0;
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 6; ++i) {
        threads.emplace_back([&, i] {
            std::minstd_rand chance(i);
            for (int n = 0; n < 40; ++n) {
                std::stop_source cancel;
                std::jthread later([&cancel, wait = chance() % 3] {
                    for (unsigned k = 0; k < wait * 50; ++k) std::this_thread::yield();
                    if (wait != 2) cancel.request_stop();
                });
                auto result = engine.generate(request_of(i, {}, cancel.get_token()));
                if (result) {
                    ++pictures;
                } else {
                    CHECK(result.error().kind == ErrorKind::kCancelled ||
                          result.error().message.find("closed") != std::string::npos);
                    ++(result.error().kind == ErrorKind::kCancelled ? cancelled : closed);
                }
                if (i == 0 && n == 35) engine.close();
            }
        });
    }
    for (std::thread& each : threads) each.join();
    CHECK(pictures > 0 && cancelled > 0 && closed > 0 && pictures + cancelled + closed == 240);
    CHECK(EngineParts::queued(engine) == 0);
}

}  // namespace

int main(int, char** argv) {
    for (const auto test : {test_order, test_pixels_and_callbacks, test_cancel_in_the_queue, test_cancel_while_it_is_drawn,
                            test_a_call_from_its_own_callback, test_close, test_everything_at_once})
        test(argv[1]);
}
