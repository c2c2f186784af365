// One TensorRT plugin for every op, as a library that TensorRT loads: plugins/shell.py once more, with the same names and fields,
// so that an engine built with either runs with the other.
//
// TensorRT finds it by two functions: getCreators and setLoggerFinder (IPluginRegistry::loadLibrary). What goes wrong in a callback
// is logged as an error of TensorRT's logger, because TensorRT itself is told of a bare failure.
#include <NvInferRuntime.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "work.hpp"

namespace sana::plugins {
namespace {

using namespace nvinfer1;

constexpr std::array<const char*, 26> kOps = {
    "CausalAttention",      "Conv3x3",             "Conv3x3Norm",          "Conv3x3Upsample",      "CrossAttention",
    "Fp8Conv3x3",           "Fp8Conv3x3Norm",      "Fp8GatedSum",          "Fp8Linear",            "Fp8Quantize",
    "Fp8StaticQuantize",    "GatedDepthwiseConv",  "GatedModulatedNorm",   "Int8Conv3x3",          "Int8Conv3x3Norm",
    "Int8StaticQuantize",   "Linear",              "LinearAttentionApply", "LinearAttentionState", "ModulatedNorm",
    "MultiscaleProjection", "NormedSum",           "NormedTaps",           "ReluLinearAttention",  "RotateHeads",
    "TapSum"};
constexpr const char *kLaunch = "launch", *kCubins = "cubins", *kVersion = "1", *kNamespace = "";

std::atomic<ILoggerFinder*> logger_finder = nullptr;

void report(const char* what) noexcept {
    ILoggerFinder* finder = logger_finder;
    ILogger* logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
        logger->log(ILogger::Severity::kERROR, what);
    } else {
        std::fprintf(stderr, "sana plugin: %s\n", what);
    }
}

template <class Work, class Answer>
Answer kept(Work work, Answer failed) noexcept {
    try {
        return work();
    } catch (const std::exception& error) {
        report(error.what());
        return failed;
    }
}

DataType data_type(const std::string& type) {
    if (type == "fp32") return DataType::kFLOAT;
    if (type == "fp16") return DataType::kHALF;
    if (type == "bf16") return DataType::kBF16;
    if (type == "fp8") return DataType::kFP8;
    if (type == "int32") return DataType::kINT32;
    if (type == "int64") return DataType::kINT64;
    if (type == "int8") return DataType::kINT8;
    if (type == "uint8") return DataType::kUINT8;
    return DataType::kBOOL;
}

// The expression as TensorRT's own, over dimensions that are not known yet.
const IDimensionExpr* dimension(const Expression& expression, const DimsExprs* inputs, std::int32_t count, IExprBuilder& builder) {
    if (expression.operation == Operation::kConstant) return builder.constant(expression.value);
    if (expression.operation == Operation::kDim) {
        const auto input = static_cast<std::int32_t>(expression.input), axis = static_cast<std::int32_t>(expression.axis);
        if (input >= count || axis >= inputs[input].nbDims)
            throw LaunchError("got no axis " + std::to_string(axis) + " of input " + std::to_string(input) + "; expected one");
        return inputs[input].d[axis];
    }
    DimensionOperation operation{};
    switch (expression.operation) {
        case Operation::kAdd: operation = DimensionOperation::kSUM; break;
        case Operation::kSub: operation = DimensionOperation::kSUB; break;
        case Operation::kMul: operation = DimensionOperation::kPROD; break;
        case Operation::kFloorDiv: operation = DimensionOperation::kFLOOR_DIV; break;
        case Operation::kCeilDiv: operation = DimensionOperation::kCEIL_DIV; break;
        case Operation::kMin: operation = DimensionOperation::kMIN; break;
        default: operation = DimensionOperation::kMAX; break;
    }
    return builder.operation(operation, *dimension(expression.parts[0], inputs, count, builder),
                             *dimension(expression.parts[1], inputs, count, builder));
}

Dims dims_of(const PluginTensorDesc* tensors, std::int32_t count) {
    Dims out(static_cast<std::size_t>(count));
    for (std::int32_t i = 0; i < count; ++i) out[i].assign(tensors[i].dims.d, tensors[i].dims.d + tensors[i].dims.nbDims);
    return out;
}

struct Description {  // of a node; shared by its clones
    Launch launch;
    std::string json, cubins;
    std::array<PluginField, 2> fields;
    PluginFieldCollection collection;
};

std::shared_ptr<const Description> describe(std::string json, std::string cubins) {
    auto out = std::make_shared<Description>();
    out->launch = Launch::from_json(json);
    out->json = std::move(json);
    cubins.resize(std::min(cubins.size(), out->launch.cubins_size()));
    out->cubins = cubins.empty() ? std::string(1, '\0') : std::move(cubins);  // TensorRT drops an empty field
    const auto field = [](const char* name, const std::string& data) {
        return PluginField{name, data.data(), PluginFieldType::kCHAR, static_cast<std::int32_t>(data.size())};
    };
    out->fields = {field(kLaunch, out->json), field(kCubins, out->cubins)};
    out->collection = {static_cast<std::int32_t>(out->fields.size()), out->fields.data()};
    return out;
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
  public:
    explicit Plugin(std::shared_ptr<const Description> description) : description_(std::move(description)) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override {
        return kept([this] { return copy(work_ != nullptr); }, static_cast<Plugin*>(nullptr));
    }

    const char* getPluginName() const noexcept override { return launch().op.c_str(); }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    // Build

    std::int32_t getNbOutputs() const noexcept override { return static_cast<std::int32_t>(launch().outputs.size()); }
    std::int32_t configurePlugin(const DynamicPluginTensorDesc*, std::int32_t, const DynamicPluginTensorDesc*,
                                 std::int32_t) noexcept override {
        return 0;
    }
    std::int32_t getOutputDataTypes(DataType* types, std::int32_t count, const DataType*, std::int32_t) const noexcept override {
        for (std::int32_t i = 0; i < count && i < getNbOutputs(); ++i) types[i] = data_type(launch().outputs[i].type);
        return 0;
    }
    std::int32_t getOutputShapes(const DimsExprs* inputs, std::int32_t num_inputs, const DimsExprs*, std::int32_t, DimsExprs* outputs,
                                 std::int32_t num_outputs, IExprBuilder& builder) noexcept override {
        return kept(
            [&] {
                for (std::int32_t i = 0; i < num_outputs && i < getNbOutputs(); ++i) {
                    const auto& shape = launch().outputs[i].shape;
                    if (shape.size() > static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS))
                        throw LaunchError(launch().op + ": got an output of " + std::to_string(shape.size()) + " axes; expected 8");
                    outputs[i].nbDims = static_cast<std::int32_t>(shape.size());
                    for (std::size_t axis = 0; axis < shape.size(); ++axis)
                        outputs[i].d[axis] = dimension(shape[axis], inputs, num_inputs, builder);
                }
                return 0;
            },
            1);
    }
    bool supportsFormatCombination(std::int32_t pos, const DynamicPluginTensorDesc* in_out, std::int32_t num_inputs,
                                   std::int32_t) noexcept override {
        return kept(
            [&] {
                const auto& inputs = launch().inputs;
                if (static_cast<std::size_t>(num_inputs) != inputs.size()) {
                    throw LaunchError(launch().op + ": got " + std::to_string(num_inputs) + " inputs; expected " +
                                      std::to_string(inputs.size()));
                }
                const std::string& wanted = pos < num_inputs ? inputs[pos] : launch().outputs.at(pos - num_inputs).type;
                const PluginTensorDesc& found = in_out[pos].desc;
                return found.type == data_type(wanted) && found.format == TensorFormat::kLINEAR;
            },
            false);
    }
    std::size_t getWorkspaceSize(const DynamicPluginTensorDesc*, std::int32_t, const DynamicPluginTensorDesc*,
                                 std::int32_t) const noexcept override {
        return launch().product ? kProductWorkspace : 0;
    }

    // Run

    const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &description_->collection; }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        return kept([this] { return copy(true); }, static_cast<Plugin*>(nullptr));
    }
    std::int32_t setTactic(std::int32_t) noexcept override { return 0; }
    std::int32_t onShapeChange(const PluginTensorDesc* inputs, std::int32_t count, const PluginTensorDesc*,
                               std::int32_t) noexcept override {
        return kept([&] { return work_ ? (prepare(dims_of(inputs, count)), 0) : 0; }, 1);
    }
    std::int32_t enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc*, const void* const* inputs,
                         void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return kept(
            [&] {
                if (!work_) throw LaunchError(launch().op + ": enqueued without a kernel; expected attachToContext before");
                const std::size_t num_inputs = launch().inputs.size();
                // onShapeChange should have been told of the shapes; a wrong grid would write beyond the tensors
                prepare(dims_of(input_desc, static_cast<std::int32_t>(num_inputs)));
                const auto address = [](const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); };
                Addresses in, out;
                for (std::size_t i = 0; i < num_inputs; ++i) in.push_back(address(inputs[i]));
                for (std::size_t i = 0; i < launch().outputs.size(); ++i) out.push_back(address(outputs[i]));
                work_->queue(in, out, address(workspace), stream);
                return 0;
            },
            1);
    }

  private:
    const Launch& launch() const { return description_->launch; }

    Plugin* copy(bool attached) const {
        auto out = std::make_unique<Plugin>(description_);
        if (attached) out->work_ = make_work(launch(), description_->cubins);
        return out.release();
    }
    void prepare(const Dims& dims) {
        if (prepared_ == dims) return;
        prepared_.reset();
        work_->prepare(dims);
        prepared_ = dims;
    }

    std::shared_ptr<const Description> description_;
    std::unique_ptr<Work> work_;
    std::optional<Dims> prepared_;  // the shapes that the work is prepared for
};

class Creator final : public IPluginCreatorV3One {
  public:
    explicit Creator(const char* op) : op_(op) {}

    const char* getPluginName() const noexcept override { return op_; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }
    const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

    IPluginV3* createPlugin(const char* name, const PluginFieldCollection* fields, TensorRTPhase) noexcept override {
        return kept([&] { return create(name != nullptr ? name : "", *fields); }, static_cast<Plugin*>(nullptr));
    }

  private:
    Plugin* create(const std::string& name, const PluginFieldCollection& fields) const {
        std::string json, cubins;
        for (std::int32_t i = 0; i < fields.nbFields; ++i) {
            const PluginField& field = fields.fields[i];
            if (field.data == nullptr || field.length <= 0) continue;
            std::string data(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length));
            if (std::strcmp(field.name, kLaunch) == 0) json = std::move(data);
            else if (std::strcmp(field.name, kCubins) == 0) cubins = std::move(data);
        }
        if (json.empty() || cubins.empty()) {
            throw LaunchError(std::string(op_) + ", node '" + name + "': got no attribute '" + (json.empty() ? kLaunch : kCubins) +
                              "'; expected launch and cubins");
        }
        while (!json.empty() && json.back() == '\0') json.pop_back();  // the ONNX parser appends one to a string attribute
        auto description = describe(std::move(json), std::move(cubins));
        if (description->launch.op != op_)
            throw LaunchError(std::string(op_) + ", node '" + name + "': got the launch description of '" + description->launch.op + "'");
        return new Plugin(std::move(description));
    }

    const char* op_;
    std::array<PluginField, 2> fields_ = {PluginField{kLaunch, nullptr, PluginFieldType::kCHAR, 0},
                                          PluginField{kCubins, nullptr, PluginFieldType::kCHAR, 0}};
    PluginFieldCollection collection_{2, fields_.data()};
};

}  // namespace
}  // namespace sana::plugins

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    sana::plugins::logger_finder = finder;
}

// For libsana_runtime, which knows the ops of a bundle before their engines load: open the library that an op runs with. If that
// fails, the op's nodes say why when they are made.
extern "C" __attribute__((visibility("default"))) void sana_plugins_open_library_of(const char* op) {
    if (std::strcmp(op, "Linear") != 0 && std::strcmp(op, "Fp8Linear") != 0) return;
    try {
        sana::plugins::open_cublas_lt();
    } catch (const std::exception&) {
    }
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    using namespace sana::plugins;
    // Never destroyed: TensorRT keeps them until it is unloaded itself.
    static const auto* const creators = [] {
        auto* out = new std::vector<nvinfer1::IPluginCreatorInterface*>;
        for (const char* op : kOps) out->push_back(new Creator(op));
        return out;
    }();
    count = static_cast<std::int32_t>(creators->size());
    return creators->data();
}
