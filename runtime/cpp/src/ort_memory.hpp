// Where ONNX Runtime takes its memory from: the system, block by block, in place of arenas.
//
// An arena is a session's own, doubles when it grows, and holds what it has: sana-tiny's four held twice of what they needed.
#pragma once

#include "ort_api.hpp"

namespace sana::ort {

// For all sessions that ask for it, by this entry of their configuration.
constexpr const char* kUseSystemMemory = "session.use_env_allocators";
void use_system_memory(const void* const* table, Env* env);

}  // namespace sana::ort
