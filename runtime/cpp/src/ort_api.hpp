// ONNX Runtime's C API, as much of it as is used, by its documented entry OrtGetApiBase.
//
// ONNX Runtime comes as a Python wheel that has the library and no headers, and Debian has neither. Its API is one table of
// functions to which releases only append, so that a function keeps its place for ever; the places below are of
// onnxruntime_c_api.h, and the version asked for is the first that has all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace sana::ort {

constexpr std::uint32_t kApiVersion = 17;  // of SetDeterministicCompute, the newest

struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct RunOptions;
struct MemoryInfo;
struct Value;
struct ShapeInfo;

struct Allocator {  // the table of one, up to the version that is asked for
    std::uint32_t version;
    void* (*alloc)(Allocator*, std::size_t);
    void (*free)(Allocator*, void*);
    const MemoryInfo* (*info)(const Allocator*);
    const MemoryInfo* memory;  // of ours
};

enum ElementType : int { kFloat = 1, kInt64 = 7 };
enum : int { kSequential = 0, kLogErrors = 3, kDeviceAllocator = 0, kDefaultMemory = 0 };

template <std::size_t Place, class Function>
struct Slot;
template <std::size_t Place, class Out, class... In>
struct Slot<Place, Out(In...)> {
    static Out call(const void* const* table, In... in) {
        return reinterpret_cast<Out (*)(In...)>(const_cast<void*>(table[Place]))(in...);
    }
};

using GetErrorCode = Slot<1, int(const Status*)>;
using GetErrorMessage = Slot<2, const char*(const Status*)>;
using CreateEnv = Slot<3, Status*(int level, const char* name, Env**)>;
using CreateSession = Slot<7, Status*(const Env*, const char* path, const SessionOptions*, Session**)>;
using Run = Slot<9, Status*(Session*, const RunOptions*, const char* const* input_names, const Value* const* inputs,
                            std::size_t num_inputs, const char* const* output_names, std::size_t num_outputs, Value** outputs)>;
using CreateSessionOptions = Slot<10, Status*(SessionOptions**)>;
using SetSessionExecutionMode = Slot<13, Status*(SessionOptions*, int mode)>;
using SetSessionLogSeverityLevel = Slot<22, Status*(SessionOptions*, int level)>;
using SetIntraOpNumThreads = Slot<24, Status*(SessionOptions*, int)>;
using SetInterOpNumThreads = Slot<25, Status*(SessionOptions*, int)>;
using SessionGetInputCount = Slot<30, Status*(const Session*, std::size_t*)>;
using SessionGetOutputCount = Slot<31, Status*(const Session*, std::size_t*)>;
using SessionGetInputName = Slot<36, Status*(const Session*, std::size_t, Allocator*, char**)>;
using SessionGetOutputName = Slot<37, Status*(const Session*, std::size_t, Allocator*, char**)>;
using CreateRunOptions = Slot<39, Status*(RunOptions**)>;
using CreateTensorWithData = Slot<49, Status*(const MemoryInfo*, void* data, std::size_t num_bytes, const std::int64_t* shape,
                                              std::size_t rank, int type, Value**)>;
using GetTensorMutableData = Slot<51, Status*(Value*, void**)>;
using GetTensorElementType = Slot<60, Status*(const ShapeInfo*, int*)>;
using GetDimensionsCount = Slot<61, Status*(const ShapeInfo*, std::size_t*)>;
using GetDimensions = Slot<62, Status*(const ShapeInfo*, std::int64_t*, std::size_t rank)>;
using GetTensorTypeAndShape = Slot<65, Status*(const Value*, ShapeInfo**)>;
using CreateCpuMemoryInfo = Slot<69, Status*(int allocator, int memory, MemoryInfo**)>;
using AllocatorFree = Slot<76, Status*(Allocator*, void*)>;
using GetAllocatorWithDefaultOptions = Slot<78, Status*(Allocator**)>;
using ReleaseEnv = Slot<92, void(Env*)>;
using ReleaseStatus = Slot<93, void(Status*)>;
using ReleaseMemoryInfo = Slot<94, void(MemoryInfo*)>;
using ReleaseSession = Slot<95, void(Session*)>;
using ReleaseValue = Slot<96, void(Value*)>;
using ReleaseRunOptions = Slot<97, void(RunOptions*)>;
using ReleaseShapeInfo = Slot<99, void(ShapeInfo*)>;
using ReleaseSessionOptions = Slot<100, void(SessionOptions*)>;
using AddSessionConfigEntry = Slot<130, Status*(SessionOptions*, const char* key, const char* value)>;
using RegisterAllocator = Slot<176, Status*(Env*, Allocator*)>;
using SetDeterministicCompute = Slot<273, Status*(SessionOptions*, bool)>;

// The library, opened once for the process.
struct Library {
    const void* const* table = nullptr;
    std::string version;
    Env* env = nullptr;
};

// path: of libonnxruntime.so; "" for $SANA_ONNXRUNTIME, then what the build found, then where the system finds it.
// Raises SanaError if there is none, or one that is too old.
const Library& library(const std::string& path);

}  // namespace sana::ort
