// Takes one plugin through its life as TensorRT does: LAUNCH_FILE CUBINS_FILE OUTPUTS SHAPE...
// A shape is "2,9"; input i lies at 4096 * (i + 1), output i at 65536 * (i + 1). Errors go to stdout, after "error ".
#include <NvInferRuntime.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

extern "C" void setLoggerFinder(ILoggerFinder* finder);
extern "C" IPluginCreatorInterface* const* getCreators(std::int32_t& count);

namespace {

struct Logger : ILogger {
    void log(Severity, const char* message) noexcept override { std::printf("error %s\n", message); }
};
struct Finder : ILoggerFinder {
    Logger logger;
    ILogger* findLogger() noexcept override { return &logger; }
};

std::string content(const char* path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

PluginTensorDesc desc(const std::string& text) {
    PluginTensorDesc out{};
    std::istringstream stream(text);
    for (std::string size; std::getline(stream, size, ',');) out.dims.d[out.dims.nbDims++] = std::stoll(size);
    return out;
}

}  // namespace

int main(int argc, char** argv) {
    Finder finder;
    setLoggerFinder(&finder);
    const std::string launch = content(argv[1]), cubins = content(argv[2]);
    PluginField fields[] = {{"launch", launch.data(), PluginFieldType::kCHAR, static_cast<std::int32_t>(launch.size())},
                            {"cubins", cubins.data(), PluginFieldType::kCHAR, static_cast<std::int32_t>(cubins.size())}};
    const PluginFieldCollection collection{2, fields};
    std::int32_t count = 0;
    IPluginCreatorInterface* const* creators = getCreators(count);
    IPluginV3* plugin = nullptr;
    for (std::int32_t i = 0; i < count && plugin == nullptr; ++i) {
        auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (launch.find("\"op\":\"" + std::string(creator->getPluginName()) + "\"") != std::string::npos)
            plugin = creator->createPlugin("node", &collection, TensorRTPhase::kRUNTIME);
    }
    if (plugin == nullptr) return 0;
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const PluginFieldCollection* kept = runtime->getFieldsToSerialize();
    for (std::int32_t i = 0; i < kept->nbFields; ++i) {
        std::printf("field %s ", kept->fields[i].name);
        for (std::int32_t at = 0; at < kept->fields[i].length; ++at)
            std::printf("%02x", static_cast<const unsigned char*>(kept->fields[i].data)[at]);
        std::printf("\n");
    }
    IPluginV3* attached = runtime->attachToContext(nullptr);
    if (attached != nullptr) {
        auto* run = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        std::vector<PluginTensorDesc> inputs;
        std::vector<const void*> from;
        std::vector<void*> to;
        for (int i = 4; i < argc; ++i) {
            inputs.push_back(desc(argv[i]));
            from.push_back(reinterpret_cast<const void*>(4096UL * inputs.size()));
        }
        for (int i = 0; i < std::stoi(argv[3]); ++i) to.push_back(reinterpret_cast<void*>(65536UL * (i + 1)));
        if (run->onShapeChange(inputs.data(), static_cast<std::int32_t>(inputs.size()), nullptr, 0) == 0)
            std::printf("enqueue %d\n", run->enqueue(inputs.data(), nullptr, from.data(), to.data(), nullptr,
                                                     reinterpret_cast<cudaStream_t>(7)));
        delete attached;
    }
    delete plugin;
}
