// An engine of parts that the caller chose: what Engine::open does once it knows what draws, and what tests do with fake sessions.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend.hpp"
#include "bundle.hpp"
#include "sana/engine.hpp"

namespace sana {

struct EngineParts {
    struct Chosen {
        std::string name, reason;  // of what draws
        std::unique_ptr<Backend> backend;
    };
    // To be told, as early as it is known and nothing else will be chosen, which of the bundle's files the backend opens: they are
    // verified while the rest of it is made.
    using Files = std::function<void(const std::vector<std::string>&)>;
    using Choose = std::function<Chosen(const Bundle&, const Files&)>;  // the bundle stays where it is as long as the engine lives

    // verify: compare the SHA-256 of the tokenizer and of what the backend opens. Raises what they raise.
    static Engine made(Bundle bundle, const Choose& choose, bool verify);

    static std::size_t queued(const Engine& engine);  // requests that wait or are drawn
};

}  // namespace sana
