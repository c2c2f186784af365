#include "trt_session.hpp"

#include <algorithm>
#include <utility>

#include "failure.hpp"
#include "levels.hpp"
#include "narrow_floats.hpp"
#include "python_text.hpp"

namespace sana {
namespace {

using nvinfer1::DataType;

std::size_t bytes_of(DataType type) {
    switch (type) {
        case DataType::kINT64:
            return 8;
        case DataType::kFLOAT:
        case DataType::kINT32:
            return 4;
        case DataType::kHALF:
        case DataType::kBF16:
            return 2;
        default:
            return 1;
    }
}

std::string numpy_name(DataType type) {
    switch (type) {
        case DataType::kINT64:
            return "int64";
        case DataType::kINT32:
            return "int32";
        case DataType::kFLOAT:
            return "float32";
        case DataType::kHALF:
            return "float16";
        case DataType::kBF16:
            return "bfloat16";
        default:
            return "type " + std::to_string(static_cast<int>(type)) + " of TensorRT";
    }
}

std::size_t count_of(const Shape& shape) {
    std::size_t count = 1;
    for (const std::int64_t each : shape) count *= static_cast<std::size_t>(each);
    return count;
}

Shape shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

nvinfer1::Dims dims_of_shape(const Shape& shape) {
    nvinfer1::Dims out{};
    out.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), out.d);
    return out;
}

std::vector<std::string> names_in(const Shapes& shapes) {
    std::vector<std::string> out;
    for (const auto& [name, shape] : shapes) out.push_back(name);
    return out;
}

}  // namespace

Kernels::Kernels(const KernelCache& cache, std::string key, [[maybe_unused]] nvinfer1::IRuntimeConfig& config)
    : cache_(cache), key_(std::move(key)) {
#if SANA_TENSORRT_RTX_API
    kernels_.reset(config.createRuntimeCache());
    if (kernels_ == nullptr) return;
    if (const auto content = cache_.read(key_)) {
        if (kernels_->deserialize(content->data(), content->size())) {
            stored_ = content->size();
        } else {
            cache_.warn("TensorRT does not take " + cache_.path(key_) + "; its kernels are compiled again");
        }
    }
    if (!config.setRuntimeCache(*kernels_)) {
        cache_.warn("TensorRT does not use one, so every start compiles kernels");
        kernels_.reset();
    }
#endif
}

void Kernels::save() {
#if SANA_TENSORRT_RTX_API
    if (kernels_ == nullptr) return;
    const std::unique_ptr<nvinfer1::IHostMemory> content(kernels_->serialize());
    if (content == nullptr || content->size() <= stored_) return;  // the same kernels are other bytes each time, but no more
    stored_ = content->size();
    cache_.write(key_, {static_cast<const char*>(content->data()), content->size()});
#endif
}

TrtSession::TrtSession(std::string path, const trt::Library& library, Cuda& cuda, Arena& arena, const KernelCache& cache,
                       const std::string& engine_sha256, std::unique_ptr<const TokenTable> tokens)
    : path_(std::move(path)), cuda_(cuda), arena_(arena), loaded_(trt::load_engine(library, path_)), tokens_(std::move(tokens)) {
    nvinfer1::ICudaEngine& engine = *loaded_.engine;
    for (std::int32_t i = 0; i < engine.getNbIOTensors(); ++i) {
        const std::string name = engine.getIOTensorName(i);
        const bool is_input = engine.getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
        (is_input ? inputs_ : outputs_).push_back(name);
        types_[name] = engine.getTensorDataType(name.c_str());
    }
    config_.reset(engine.createRuntimeConfig());
    if (config_ == nullptr) throw Failure(ErrorKind::kSana, path_ + ": TensorRT made no runtime configuration for it." + trt::why());
    config_->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
#if SANA_TENSORRT_RTX_API
    config_->setDynamicShapesKernelSpecializationStrategy(nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
#endif
    if (cache.kept()) kernels_ = std::make_unique<Kernels>(cache, cache.key(engine_sha256), *config_);
    context_.reset(engine.createExecutionContext(config_.get()));
    if (context_ == nullptr) throw Failure(ErrorKind::kSana, path_ + ": TensorRT made no execution context for it." + trt::why());
}

Shapes TrtSession::prepare(const Shapes& shapes) {
    Shapes wanted;
    std::vector<std::string> missing;
    for (const std::string& name : inputs_) {
        if (const auto found = shapes.find(name); found != shapes.end()) {
            wanted.insert(*found);
        } else {
            missing.push_back(name);
        }
    }
    if (!missing.empty()) {
        throw Failure(ErrorKind::kBundle, path_ + ": the engine wants " + join(missing) + "; got " + join(names_in(shapes)) +
                                              ". Rebuild the bundle.");
    }
    if (wanted != shapes_) {
        shapes_.clear();
        settled_ = false;
        for (const auto& [name, shape] : wanted) {
            check_range(name, shape);
            if (!context_->setInputShape(name.c_str(), dims_of_shape(shape))) {
                throw Failure(ErrorKind::kSana, path_ + ": TensorRT refused the shape " + shape_repr(shape) + " of " + repr(name) +
                                                    "." + trt::why());
            }
        }
        needed_ = std::max(kDeviceAlignment, context_->updateDeviceMemorySizeForShapes());
        shapes_ = wanted;
        if (compiled_.insert(wanted).second) unsaved_ = true;
    }
    arena_.reserve(needed_);
    Shapes out;
    for (const std::string& name : outputs_) out[name] = shape_of(context_->getTensorShape(name.c_str()));
    return out;
}

void TrtSession::check_range(const std::string& name, const Shape& shape) const {
    const auto bound = [&](nvinfer1::OptProfileSelector which) {
        return shape_of(loaded_.engine->getProfileShape(name.c_str(), 0, which));
    };
    const Shape low = bound(nvinfer1::OptProfileSelector::kMIN), high = bound(nvinfer1::OptProfileSelector::kMAX);
    bool fits = shape.size() == low.size() && shape.size() == high.size();
    for (std::size_t i = 0; fits && i < shape.size(); ++i) fits = low[i] <= shape[i] && shape[i] <= high[i];
    if (!fits) {
        throw Failure(ErrorKind::kRequest, path_ + ", input " + repr(name) + ": got shape " + shape_repr(shape) +
                                               "; the engine serves " + shape_repr(low) + " to " + shape_repr(high) +
                                               ". Ask for another size or a smaller batch, or rebuild with another range.");
    }
}

void TrtSession::launch(const Addresses& addresses) {
    if (arena_.address() != arena_address_ || arena_.size() != arena_size_) {  // it grows when something needs more
        arena_address_ = arena_.address();
        arena_size_ = arena_.size();
        context_->setDeviceMemoryV2(reinterpret_cast<void*>(arena_address_), static_cast<std::int64_t>(arena_size_));
    }
    for (const auto* names : {&inputs_, &outputs_}) {
        for (const std::string& name : *names) {
            const auto found = addresses.find(name);
            if (found == addresses.end() ||
                !context_->setTensorAddress(name.c_str(), reinterpret_cast<void*>(found->second))) {
                throw Failure(ErrorKind::kSana, path_ + ": TensorRT refused the address of " + repr(name) + ".");
            }
        }
    }
    if (!context_->enqueueV3(static_cast<cudaStream_t>(cuda_.stream())))
        throw Failure(ErrorKind::kSana, path_ + ": TensorRT could not run the engine." + trt::why());
    settled_ = true;
}

std::size_t TrtSession::output_size(const std::string& name, const Shape& shape) const {
    return count_of(shape) * bytes_of(types_.at(name));
}

Outputs TrtSession::run(const Inputs& given, Loops* loops) {
    const LookedUp looked_up(tokens_.get(), given);
    const Inputs& inputs = looked_up.inputs;
    Shapes shapes;
    for (const auto& [name, tensor] : inputs) shapes[name] = tensor->shape;
    const Shapes made = prepare(shapes);
    Addresses addresses;
    for (const std::string& name : inputs_) addresses[name] = upload(name, *inputs.at(name));
    for (const auto& [name, shape] : made) addresses[name] = slot(name).reserve(output_size(name, shape));
    void* loop = nullptr;
    if (loops != nullptr && settled_) {  // of one engine, so names are in the same order
        Loops::Key key = {static_cast<std::int64_t>(arena_.address()), static_cast<std::int64_t>(arena_.size())};
        for (const auto& [name, shape] : shapes_) key.insert(key.end(), shape.begin(), shape.end());
        for (const auto& [name, address] : addresses) key.push_back(static_cast<std::int64_t>(address));
        loop = loops->get(key, [&] { launch(addresses); });
    }
    if (loop == nullptr) {
        launch(addresses);
    } else {
        cuda_.launch_graph(loop);
    }
    Outputs out;
    for (const auto& [name, shape] : made) {
        if (name != kLevels && name != kNotFinite) out.emplace(name, download(name, shape));  // those of the graph
    }
    for (const auto& [name, each] : slots_) each->settled();
    return out;
}

Address TrtSession::upload(const std::string& name, const Tensor& tensor) {
    const bool integers = std::holds_alternative<std::vector<std::int64_t>>(tensor.data);
    if (types_.at(name) == DataType::kBF16 && !integers) {
        std::vector<std::uint16_t> bits(tensor.floats().size());
        std::transform(tensor.floats().begin(), tensor.floats().end(), bits.begin(), to_bfloat16);
        return slot(name).write(bits);
    }
    if (types_.at(name) != (integers ? DataType::kINT64 : DataType::kFLOAT)) {
        throw Failure(ErrorKind::kSana, path_ + ", input " + repr(name) + ": got " + (integers ? "int64" : "float32") +
                                            "; expected " + numpy_name(types_.at(name)) + ".");
    }
    return std::visit([&](const auto& data) { return slot(name).write(data); }, tensor.data);
}

Tensor TrtSession::download(const std::string& name, const Shape& shape) {
    const std::size_t count = count_of(shape);
    const DataType type = types_.at(name);
    if (type == DataType::kFLOAT) return {shape, slot(name).read<float>(count)};
    if (type != DataType::kHALF && type != DataType::kBF16) {
        throw Failure(ErrorKind::kSana, path_ + ", output " + repr(name) + ": got " + numpy_name(type) + "; expected a float.");
    }
    const std::vector<std::uint16_t> bits = slot(name).read<std::uint16_t>(count);
    std::vector<float> out(count);
    std::transform(bits.begin(), bits.end(), out.begin(), type == DataType::kHALF ? from_half : from_bfloat16);
    return {shape, std::move(out)};
}

DeviceBuffer& TrtSession::slot(const std::string& name) {
    auto& held = slots_[name];
    if (held == nullptr) held = std::make_unique<DeviceBuffer>(cuda_);
    return *held;
}

void TrtSession::free_buffers() noexcept { slots_.clear(); }

void TrtSession::save_kernels() {
    if (kernels_ != nullptr && unsaved_) kernels_->save();
    unsaved_ = false;
}

}  // namespace sana
