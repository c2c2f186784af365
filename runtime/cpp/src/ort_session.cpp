#include "ort_session.hpp"

#include <sched.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <utility>

#include "failure.hpp"
#include "ort_memory.hpp"
#include "python_text.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

using namespace ort;

const void* const* table = nullptr;  // of the one library of this process: deleters have no room for it

template <class Release, class T>
void release(T* object) {
    Release::call(table, object);
}

// As the Python package writes it.
std::string message_of(Status* status) {
    static constexpr const char* kNames[] = {
        "SUCCESS",          "FAIL",         "INVALID_ARGUMENT", "NO_SUCHFILE",   "NO_MODEL", "ENGINE_ERROR", "RUNTIME_EXCEPTION",
        "INVALID_PROTOBUF", "MODEL_LOADED", "NOT_IMPLEMENTED",  "INVALID_GRAPH", "EP_FAIL"};
    const int code = GetErrorCode::call(table, status);
    const char* name = code >= 0 && code < static_cast<int>(std::size(kNames)) ? kNames[code] : "FAIL";
    std::string text = "[ONNXRuntimeError] : " + std::to_string(code) + " : " + name + " : " + GetErrorMessage::call(table, status);
    ReleaseStatus::call(table, status);
    return text;
}

// As exact_products() in runtime/ort_session.py.
bool adds_in_32_bits() {
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_cpu_supports("avx512vnni") || __builtin_cpu_supports("avxvnni");
#else
    return true;
#endif
}

struct OrtError {
    std::string message;
};

void check(Status* status) {
    if (status != nullptr) throw OrtError{message_of(status)};
}

template <class Count, class Name>
std::vector<std::string> names_of(const ort::Session* session) {
    std::size_t count = 0;
    check(Count::call(table, session, &count));
    Allocator* allocator = nullptr;
    check(GetAllocatorWithDefaultOptions::call(table, &allocator));
    std::vector<std::string> names;
    for (std::size_t i = 0; i < count; ++i) {
        char* name = nullptr;
        check(Name::call(table, session, i, allocator, &name));
        names.emplace_back(name);
        check(AllocatorFree::call(table, allocator, name));
    }
    return names;
}

using OwnedValue = std::unique_ptr<Value, void (*)(Value*)>;

OwnedValue borrowed(const MemoryInfo* memory, const Tensor& tensor) {  // a view: the tensor must outlive it
    Value* value = nullptr;
    std::visit(
        [&](const auto& data) {
            using Element = typename std::decay_t<decltype(data)>::value_type;
            constexpr int kType = std::is_same_v<Element, float> ? kFloat : kInt64;
            check(CreateTensorWithData::call(table, memory, const_cast<Element*>(data.data()), data.size() * sizeof(Element),
                                             tensor.shape.data(), tensor.shape.size(), kType, &value));
        },
        tensor.data);
    return {value, release<ReleaseValue, Value>};
}

Tensor copied(Value* value) {
    ShapeInfo* raw = nullptr;
    check(GetTensorTypeAndShape::call(table, value, &raw));
    const std::unique_ptr<ShapeInfo, void (*)(ShapeInfo*)> info(raw, release<ReleaseShapeInfo, ShapeInfo>);
    std::size_t rank = 0;
    int type = 0;
    check(GetDimensionsCount::call(table, info.get(), &rank));
    check(GetTensorElementType::call(table, info.get(), &type));
    if (type != kFloat) throw OrtError{"an output of type " + std::to_string(type) + ", not float"};
    Tensor out{std::vector<std::int64_t>(rank), std::vector<float>()};
    check(GetDimensions::call(table, info.get(), out.shape.data(), rank));
    std::size_t count = 1;
    for (const std::int64_t each : out.shape) count *= static_cast<std::size_t>(each);
    void* data = nullptr;
    check(GetTensorMutableData::call(table, value, &data));
    out.floats().resize(count);
    std::memcpy(out.floats().data(), data, count * sizeof(float));
    return out;
}

}  // namespace

int default_threads() {
    cpu_set_t set;
    int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    std::ifstream file("/sys/fs/cgroup/cpu.max");  // a container's, in microseconds
    long quota = 0, period = 0;
    if (file >> quota >> period && period > 0) cores = std::max(1, static_cast<int>(std::min<long>(cores, quota / period)));
    return cores;
}

std::string cpu_name() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        const std::size_t colon = line.find(':');
        if (line.starts_with("model name") && colon != line.npos) return "CPU, " + strip(line.substr(colon + 1));
    }
    return "CPU";
}

OrtSession::OrtSession(std::string path, int num_threads, const std::string& library, std::unique_ptr<const TokenTable> tokens)
    : path_(std::move(path)),
      ort_(ort::library(library)),
      session_(nullptr, release<ReleaseSession, ort::Session>),
      run_options_(nullptr, release<ReleaseRunOptions, RunOptions>),
      memory_(nullptr, release<ReleaseMemoryInfo, MemoryInfo>),
      tokens_(std::move(tokens)) {
    [[maybe_unused]] static const bool known = (table = ort_.table, true);  // once, before any thread reads it
    try {
        SessionOptions* raw = nullptr;
        check(CreateSessionOptions::call(table, &raw));
        const Owned<SessionOptions> options(raw, release<ReleaseSessionOptions, SessionOptions>);
        check(SetIntraOpNumThreads::call(table, raw, num_threads > 0 ? num_threads : default_threads()));
        check(SetInterOpNumThreads::call(table, raw, 1));
        // Threads that spin between operators take the cores from others.
        check(AddSessionConfigEntry::call(table, raw, "session.intra_op.allow_spinning", "0"));
        check(AddSessionConfigEntry::call(table, raw, kUseSystemMemory, "1"));
        if (!adds_in_32_bits()) {
            check(AddSessionConfigEntry::call(table, raw, "session.disable_quant_qdq", "1"));
        }
        check(SetSessionExecutionMode::call(table, raw, kSequential));
        check(SetDeterministicCompute::call(table, raw, true));
        check(SetSessionLogSeverityLevel::call(table, raw, kLogErrors));
        ort::Session* session = nullptr;
        check(CreateSession::call(table, ort_.env, path_.c_str(), raw, &session));
        session_.reset(session);
        RunOptions* run_options = nullptr;
        check(CreateRunOptions::call(table, &run_options));
        run_options_.reset(run_options);
        MemoryInfo* memory = nullptr;
        check(CreateCpuMemoryInfo::call(table, kDeviceAllocator, kDefaultMemory, &memory));
        memory_.reset(memory);
        inputs_ = names_of<SessionGetInputCount, SessionGetInputName>(session);
        outputs_ = names_of<SessionGetOutputCount, SessionGetOutputName>(session);
    } catch (const OrtError& error) {
        throw Failure(ErrorKind::kBundle,
                      path_ + ": ONNX Runtime " + ort_.version + " does not take it (" + error.message + "). Rebuild.");
    }
}

Outputs OrtSession::run(const Inputs& given_inputs) {
    const LookedUp looked_up(tokens_.get(), given_inputs);
    const Inputs& inputs = looked_up.inputs;
    std::vector<std::string> missing, given;
    for (const std::string& name : inputs_) {
        if (!inputs.contains(name)) missing.push_back(name);
    }
    for (const auto& [name, tensor] : inputs) given.push_back(name);
    if (!missing.empty()) {
        throw Failure(ErrorKind::kSana,
                      path_ + ": the graph wants " + join(missing) + "; got " + join(given) + ". Rebuild the bundle.");
    }
    try {
        std::vector<OwnedValue> values;
        std::vector<const Value*> raw;
        std::vector<const char*> input_names, output_names;
        for (const std::string& name : inputs_) {
            values.push_back(borrowed(memory_.get(), *inputs.at(name)));
            raw.push_back(values.back().get());
            input_names.push_back(name.c_str());
        }
        for (const std::string& name : outputs_) output_names.push_back(name.c_str());
        std::vector<Value*> results(outputs_.size(), nullptr);
        Status* status = Run::call(table, session_.get(), run_options_.get(), input_names.data(), raw.data(), raw.size(),
                                   output_names.data(), output_names.size(), results.data());
        std::vector<OwnedValue> owned;
        for (Value* each : results) owned.emplace_back(each, release<ReleaseValue, Value>);
        check(status);
        Outputs outputs;
        for (std::size_t i = 0; i < results.size(); ++i) outputs.emplace(outputs_[i], copied(results[i]));
        return outputs;
    } catch (const OrtError& error) {
        std::vector<std::string> shapes;
        for (const std::string& name : inputs_) shapes.push_back(repr(name) + ": " + shape_repr(inputs.at(name)->shape));
        throw Failure(ErrorKind::kSana, path_ + ": ONNX Runtime failed (" + error.message + "); got {" + join(shapes) + "}.");
    }
}

}  // namespace sana
