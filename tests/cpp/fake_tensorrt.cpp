// A libtensorrt_rtx.so.1 whose engines are portable graphs, run by ONNX Runtime on the host memory of fake_gpu.cpp.
//
// TensorRT's classes are thin: each calls a table of virtual functions. What the runtime calls is put into its place of such a
// table; all other places end the program. An engine's file is text: "graph PATH", "activations BYTES", then "in NAME TYPE RANK" and
// "out NAME TYPE"; what a decoder's engine gives beside images is made of those. FAKE_TENSORRT_FAILS: "load", "context", "run": what fails,
// or "finite": no number is one. FAKE_TENSORRT_SLOW: a component whose engine takes half a
// second to load, or not to.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <sstream>
#include <thread>
#include <typeinfo>
#include <vector>

#include "levels.hpp"
#include "narrow_floats.hpp"
#include "ort_session.hpp"

#define FAKE extern "C" __attribute__((visibility("default")))

namespace {

using namespace nvinfer1;

template <class Function>
Function in_gpu(const char* name) {
    return reinterpret_cast<Function>(dlsym(dlopen("libcuda.so.1", RTLD_NOW), name));
}
void log(const std::string& line) { in_gpu<void (*)(const char*)>("fake_gpu_log")(line.c_str()); }

bool fails(const char* what) {
    const char* named = std::getenv("FAKE_TENSORRT_FAILS");
    return named != nullptr && std::strcmp(named, what) == 0;
}

void unexpected() {
    std::fprintf(stderr, "fake_tensorrt.cpp: a function was called that it does not have\n");
    std::abort();
}

constexpr std::size_t kPlaces = 128;

// An object of the interface `V` with some of its functions. `Self` is what they get as their first argument.
template <class V, class Self>
class Table {
  public:
    Table() {
        entries_[1] = const_cast<std::type_info*>(&typeid(V));  // for sanitizers
        for (std::size_t i = 0; i < kPlaces; ++i) entries_[2 + i] = reinterpret_cast<void*>(unexpected);
    }
    template <class Member, class Function>
    void set(Member member, Function* function) {
        std::uintptr_t place = 0;  // of a virtual function: one more than its offset in the table (Itanium C++ ABI, 2.3)
        std::memcpy(&place, &member, sizeof place);
        entries_[2 + (place - 1) / sizeof(void*)] = reinterpret_cast<void*>(function);
    }
    V* interface() { return reinterpret_cast<V*>(this); }

  private:
    void* const* functions_ = entries_ + 2;  // first: where a class with virtual functions has it
    void* entries_[2 + kPlaces] = {};
};

struct Memory final : IHostMemory {
    struct Impl : Table<apiv::VHostMemory, Impl> {
        std::string content;
    } impl;
    explicit Memory(std::string content) {
        impl.content = std::move(content);
        impl.set(&apiv::VHostMemory::data, +[](const Impl* self) { return const_cast<void*>(static_cast<const void*>(self->content.data())); });
        impl.set(&apiv::VHostMemory::size, +[](const Impl* self) { return self->content.size(); });
        mImpl = impl.interface();
    }
};

struct Cache final : IRuntimeCache {  // a line for each kernel
    struct Impl : Table<apiv::VRuntimeCache, Impl> {
        std::set<std::string> kernels;
    } impl;
    Cache() {
        impl.set(&apiv::VRuntimeCache::serialize, +[](const Impl* self) -> IHostMemory* {
            if (in_gpu<int (*)()>("fake_gpu_capturing")()) unexpected();
            std::string out = "kernels\n";
            for (const std::string& each : self->kernels) out += each + "\n";
            return new Memory(out);
        });
        impl.set(&apiv::VRuntimeCache::deserialize, +[](Impl* self, const void* blob, std::size_t size) {
            std::istringstream lines(std::string(static_cast<const char*>(blob), size));
            std::string line;
            if (!std::getline(lines, line) || line != "kernels") return false;
            while (std::getline(lines, line)) self->kernels.insert(line);
            return true;
        });
        mImpl = impl.interface();
    }
};

struct Config final : IRuntimeConfig {
    struct Impl : Table<apiv::VRuntimeConfig, Impl> {
        bool user_managed = false, eager = false;
        const Cache* cache = nullptr;
    } impl;
    Config() {
        using V = apiv::VRuntimeConfig;
        impl.set(&V::setExecutionContextAllocationStrategy, +[](Impl* self, ExecutionContextAllocationStrategy how) {
            self->user_managed = how == ExecutionContextAllocationStrategy::kUSER_MANAGED;
        });
        impl.set(&V::setDynamicShapesKernelSpecializationStrategy, +[](Impl* self, DynamicShapesKernelSpecializationStrategy how) {
            self->eager = how == DynamicShapesKernelSpecializationStrategy::kEAGER;
        });
        impl.set(&V::createRuntimeCache, +[](const Impl*) -> IRuntimeCache* { return new Cache; });
        impl.set(&V::setRuntimeCache, +[](Impl* self, const IRuntimeCache& cache) {
            self->cache = static_cast<const Cache*>(&cache);
            return true;
        });
        mImpl = impl.interface();
    }
};

struct Io {
    std::string name;
    bool input;
    DataType type;
    std::int32_t rank;
};

struct Description {
    std::string graph, name;
    std::size_t activations = 0;
    std::vector<Io> tensors;

    bool has(const std::string& name) const {
        return std::any_of(tensors.begin(), tensors.end(), [&](const Io& each) { return each.name == name; });
    }
};

using Shape = std::vector<std::int64_t>;

std::size_t count_of(const Shape& shape) {
    std::size_t out = 1;
    for (const std::int64_t each : shape) out *= static_cast<std::size_t>(each);
    return out;
}

sana::Tensor tensor_of(DataType type, const Shape& shape, const void* data) {  // nullptr: of zeros
    sana::Tensor out{shape, {}};
    const auto fill = [&](auto values) {
        values.resize(count_of(shape));
        if (data != nullptr) std::memcpy(values.data(), data, values.size() * sizeof values[0]);
        out.data = std::move(values);
    };
    if (type == DataType::kBF16) {
        out.data = std::vector<float>(count_of(shape));
        for (std::size_t i = 0; data != nullptr && i < out.floats().size(); ++i)
            out.floats()[i] = sana::from_bfloat16(static_cast<const std::uint16_t*>(data)[i]);
        return out;
    }
    type == DataType::kINT64 ? fill(std::vector<std::int64_t>()) : fill(std::vector<float>());
    return out;
}

// What a decoder's engine gives beside images, whole numbers as floats here.
void add_levels(sana::Outputs& outputs) {
    const sana::Tensor& images = outputs.at("images");
    const std::int64_t batch = images.shape[0], plane = images.shape[2] * images.shape[3];
    std::vector<float> levels, bad(static_cast<std::size_t>(batch), 0.0f);
    for (std::int64_t i = 0; i < batch * plane * 3; ++i) {  // in the order of levels
        const std::int64_t pixel = i / 3 % plane, picture = i / 3 / plane;
        const float x = images.floats()[static_cast<std::size_t>((picture * 3 + i % 3) * plane + pixel)];
        levels.push_back(std::nearbyint((std::fmin(std::fmax(x, -1.0f), 1.0f) + 1.0f) * 127.5f));
        bad[static_cast<std::size_t>(picture)] += std::isfinite(x) && !fails("finite") ? 0.0f : 1.0f;
    }
    const sana::Tensor as_picture{{batch, images.shape[2], images.shape[3], 3}, std::move(levels)};
    outputs.emplace(sana::kLevels, as_picture);
    outputs.emplace(sana::kNotFinite, sana::Tensor{{batch}, std::move(bad)});
}

struct Context final : IExecutionContext {
    struct Impl : Table<apiv::VExecutionContext, Impl> {
        const Description* description;
        sana::OrtSession* session;
        Cache::Impl* cache;
        std::set<std::string> own;  // kernels, where there is no cache
        std::map<std::string, Shape> shapes;
        std::map<std::string, void*> addresses;
        void* memory = nullptr;
        std::int64_t memory_size = 0;

        sana::Outputs run(bool zeros, const std::map<std::string, Shape>& of, const std::map<std::string, void*>& at) const {
            std::map<std::string, sana::Tensor> tensors;
            for (const Io& each : description->tensors) {
                if (each.input) tensors.emplace(each.name, tensor_of(each.type, of.at(each.name), zeros ? nullptr : at.at(each.name)));
            }
            sana::Inputs inputs;
            for (const auto& [name, tensor] : tensors) inputs[name] = &tensor;
            sana::Outputs out = session->run(inputs);
            if (description->has(sana::kLevels)) add_levels(out);
            return out;
        }
        void compile() {
            std::string kernel;
            for (const auto& [name, shape] : shapes) {
                kernel += name;
                for (const std::int64_t each : shape) kernel += " " + std::to_string(each);
                kernel += ";";
            }
            if (!(cache != nullptr ? cache->kernels : own).insert(kernel).second) return;
            if (in_gpu<int (*)()>("fake_gpu_capturing")()) unexpected();
            log("compile " + description->name);
        }
    } impl;

    Context(const Description& description, sana::OrtSession& session, const Config::Impl& config) {
        using V = apiv::VExecutionContext;
        if (!config.user_managed || !config.eager) unexpected();
        impl.description = &description;
        impl.session = &session;
        impl.cache = config.cache != nullptr ? const_cast<Cache::Impl*>(&config.cache->impl) : nullptr;
        impl.set(&V::setInputShape, +[](Impl* self, const char* name, const Dims& dims) {
            self->shapes[name] = Shape(dims.d, dims.d + dims.nbDims);
            return true;
        });
        impl.set(&V::updateDeviceMemorySizeForShapes, +[](Impl* self) { return self->description->activations; });
        impl.set(&V::getTensorShape, +[](const Impl* self, const char* name) {
            const sana::Outputs outputs = self->run(true, self->shapes, {});
            const Shape& shape = outputs.at(name).shape;
            Dims out{};
            out.nbDims = static_cast<std::int32_t>(shape.size());
            std::copy(shape.begin(), shape.end(), out.d);
            return out;
        });
        impl.set(&V::setDeviceMemoryV2, +[](Impl* self, void* memory, std::int64_t size) {
            self->memory = memory;
            self->memory_size = size;
        });
        impl.set(&V::setTensorAddress, +[](Impl* self, const char* name, void* data) {
            self->addresses[name] = data;
            return data != nullptr && reinterpret_cast<std::uintptr_t>(data) % 256 == 0;
        });
        impl.set(&V::enqueueV3, +[](Impl* self, cudaStream_t stream) {
            if (reinterpret_cast<std::uintptr_t>(stream) != 7) unexpected();
            if (self->memory_size < static_cast<std::int64_t>(self->description->activations)) unexpected();
            self->compile();
            std::string line = "run " + self->description->name + " arena " + std::to_string(self->memory_size);
            for (const auto& [name, address] : self->addresses)
                line += " " + name + "=" + std::to_string(reinterpret_cast<std::uintptr_t>(address));
            log(line);
            const std::function<void()> work = [self, shapes = self->shapes, addresses = self->addresses, memory = self->memory] {
                const sana::Outputs outputs = self->run(false, shapes, addresses);
                std::memset(memory, 0xAA, self->description->activations);  // scratch: whoever keeps something there loses it
                for (const auto& [name, tensor] : outputs) {
                    const std::vector<float>& values = tensor.floats();
                    if (name == sana::kLevels) {
                        std::copy(values.begin(), values.end(), static_cast<std::uint8_t*>(addresses.at(name)));
                    } else if (name == sana::kNotFinite) {
                        std::copy(values.begin(), values.end(), static_cast<std::int32_t*>(addresses.at(name)));
                    } else {
                        std::memcpy(addresses.at(name), values.data(), values.size() * sizeof(float));
                    }
                }
            };
            in_gpu<void (*)(const std::function<void()>*)>("fake_gpu_enqueue")(&work);
            return !fails("run");
        });
        mImpl = impl.interface();
    }
};

struct Engine final : ICudaEngine {
    struct Impl : Table<apiv::VCudaEngine, Impl> {
        Description description;
        std::unique_ptr<sana::OrtSession> session;

        const Io& io(const char* name) const {
            for (const Io& each : description.tensors) {
                if (each.name == name) return each;
            }
            std::abort();
        }
    } impl;

    explicit Engine(Description described) {
        using V = apiv::VCudaEngine;
        impl.session = std::make_unique<sana::OrtSession>(described.graph, 1, "");
        impl.description = std::move(described);
        impl.set(&V::getNbIOTensors, +[](const Impl* self) { return static_cast<std::int32_t>(self->description.tensors.size()); });
        impl.set(&V::getIOTensorName, +[](const Impl* self, std::int32_t index) {
            return self->description.tensors[static_cast<std::size_t>(index)].name.c_str();
        });
        impl.set(&V::getTensorIOMode, +[](const Impl* self, const char* name) {
            return self->io(name).input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
        });
        impl.set(&V::getTensorDataType, +[](const Impl* self, const char* name) { return self->io(name).type; });
        impl.set(&V::getProfileShape, +[](const Impl* self, const char* name, std::int32_t, OptProfileSelector which) {
            Dims out{};
            out.nbDims = self->io(name).rank;
            for (std::int32_t i = 0; i < out.nbDims; ++i) out.d[i] = which == OptProfileSelector::kMIN ? 1 : 16;
            return out;
        });
        impl.set(&V::createRuntimeConfig, +[](Impl*) -> IRuntimeConfig* { return new Config; });
        impl.set(&V::createExecutionContextWithRuntimeConfig, +[](Impl* self, IRuntimeConfig* config) -> IExecutionContext* {
            return fails("context") ? nullptr : new Context(self->description, *self->session, static_cast<Config*>(config)->impl);
        });
        mImpl = impl.interface();
    }
};

struct Runtime final : IRuntime {
    struct Impl : Table<apiv::VRuntime, Impl> {
        ILogger* logger;
    } impl;

    explicit Runtime(ILogger* logger) {
        using V = apiv::VRuntime;
        impl.logger = logger;
        impl.set(&V::getEngineValidity, +[](const Impl*, const void* blob, std::int64_t, std::uint64_t* diagnostics) {
            const bool good = std::memcmp(blob, "graph ", 6) == 0 || std::memcmp(blob, "vtrt", 4) == 0;
            *diagnostics = good ? 0 : static_cast<std::uint64_t>(EngineInvalidityDiagnostics::kMALFORMED_ENGINE);
            return good ? EngineValidity::kVALID : EngineValidity::kINVALID;
        });
        impl.set(&V::deserializeCudaEngine, +[](Impl* self, const void* blob, std::size_t size) -> ICudaEngine* {
            const std::string text(static_cast<const char*>(blob), size);
            Description out;
            std::istringstream lines(text);
            for (std::string word; lines >> word;) {
                if (word == "graph") lines >> out.graph;
                if (word == "activations") lines >> out.activations;
                if (word != "in" && word != "out") continue;
                Io& io = out.tensors.emplace_back();
                io.input = word == "in";
                std::string type;
                lines >> io.name >> type >> io.rank;
                static const std::map<std::string, DataType> types = {{"int64", DataType::kINT64}, {"bfloat16", DataType::kBF16},
                                                                      {"uint8", DataType::kUINT8}, {"int32", DataType::kINT32}};
                io.type = types.contains(type) ? types.at(type) : DataType::kFLOAT;
            }
            out.name = out.graph.substr(0, out.graph.rfind('/'));
            out.name.erase(0, out.name.rfind('/') + 1);
            if (const char* slow = std::getenv("FAKE_TENSORRT_SLOW"); slow != nullptr && out.name == slow)
                std::this_thread::sleep_for(std::chrono::milliseconds(500));
            if (out.graph.empty() || fails("load")) {
                self->logger->log(ILogger::Severity::kERROR, "the fake does not want this engine");
                return nullptr;
            }
            log("load " + out.name);
            return new Engine(std::move(out));
        });
        mImpl = impl.interface();
    }
};

}  // namespace

FAKE void* createInferRuntime_INTERNAL(void* logger, std::int32_t) noexcept { return static_cast<IRuntime*>(new Runtime(static_cast<ILogger*>(logger))); }
FAKE IPluginRegistry* getPluginRegistry() noexcept { return nullptr; }
FAKE std::int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
FAKE std::int32_t getInferLibMinorVersion() noexcept { return std::getenv("FAKE_TENSORRT_OLD") != nullptr ? -1 : NV_TENSORRT_MINOR; }
FAKE std::int32_t getInferLibPatchVersion() noexcept { return 0; }
FAKE std::int32_t getInferLibBuildVersion() noexcept { return 0; }
