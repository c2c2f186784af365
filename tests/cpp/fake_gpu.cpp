// A libcuda.so.1 for the session of TensorRT: memory is the host's, and what is queued is done when somebody waits, and not before.
// So a buffer that is written again too early, and a missing wait, give wrong numbers here as they would on a GPU. New memory is
// full of NaN, and has the address of what was freed last, if that was of as many blocks. FAKE_CUDA_SM: the architecture, "89";
// FAKE_GPU_MEMORY: bytes; FAKE_GPU_LOG: a file that is told what happens; FAKE_CUDA_SLOW: the seconds that cuInit and a context take;
// FAKE_CUDA_FAILS: cuDeviceGetCount or cuDevicePrimaryCtxRetain.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define FAKE extern "C" __attribute__((visibility("default")))

namespace {

using Work = std::function<void()>;

struct Graph {
    std::vector<Work> work;
    std::size_t num_freed = 0;  // allocations, when it was captured
};

std::recursive_mutex lock;  // engines load in several threads
std::deque<Work> queued;
Graph* captured = nullptr;
std::map<std::uint64_t, std::size_t> held;
// By blocks: what was freed. It outlives the check for leaks.
std::map<std::size_t, std::vector<std::uint64_t>>& spare = *new std::map<std::size_t, std::vector<std::uint64_t>>;
std::size_t num_freed = 0;
constexpr std::size_t kBlock = 1 << 16;  // bytes
constexpr int kInvalid = 1;              // CUDA_ERROR_INVALID_VALUE
constexpr int kCapturing = 900;  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED

void log(const std::string& line) {
    const char* path = std::getenv("FAKE_GPU_LOG");
    if (path == nullptr) return;
    std::FILE* file = std::fopen(path, "a");
    std::fprintf(file, "%s\n", line.c_str());
    std::fclose(file);
}

void enqueue(Work work) {
    if (captured != nullptr) {
        captured->work.push_back(std::move(work));
    } else {
        queued.push_back(std::move(work));
    }
}

void one() {
    const Work work = std::move(queued.front());
    queued.pop_front();
    work();
}

void be_slow() {
    if (const char* slow = std::getenv("FAKE_CUDA_SLOW")) std::this_thread::sleep_for(std::chrono::duration<double>(std::atof(slow)));
}

int fails(const char* call) {
    const char* named = std::getenv("FAKE_CUDA_FAILS");
    return named != nullptr && std::strcmp(named, call) == 0 ? 719 : 0;
}

std::uint64_t aligned(std::size_t size) {
    void* out = std::aligned_alloc(256, (size + 255) / 256 * 256);
    std::memset(out, 0xFF, size);  // float32 of these bytes is NaN
    return reinterpret_cast<std::uint64_t>(out);
}

}  // namespace

// For the fake TensorRT.
FAKE void fake_gpu_enqueue(const std::function<void()>* work) {
    const std::lock_guard on(lock);
    enqueue(*work);
}
FAKE void fake_gpu_log(const char* line) {
    const std::lock_guard on(lock);
    log(line);
}
FAKE int fake_gpu_capturing() { return captured != nullptr; }

FAKE int cuInit(unsigned) { return be_slow(), 0; }
FAKE int cuDeviceGetCount(int* count) { return *count = 1, fails("cuDeviceGetCount"); }
FAKE int cuDeviceGet(int* device, int) { return *device = 0, 0; }
FAKE int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
FAKE int cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, static_cast<std::size_t>(size), "NVIDIA Fake"), 0; }
FAKE int cuDeviceGetAttribute(int* value, int which, int) { return *value = std::getenv("FAKE_CUDA_SM")[which - 75] - '0', 0; }
FAKE int cuDevicePrimaryCtxRetain(void** context, int) {
    be_slow();
    *context = reinterpret_cast<void*>(1);
    return fails("cuDevicePrimaryCtxRetain");
}
FAKE int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
FAKE int cuCtxSetCurrent(void*) { return 0; }
FAKE int cuStreamCreate(void** stream, unsigned) { return *stream = reinterpret_cast<void*>(7), 0; }
FAKE int cuStreamDestroy_v2(void*) { return 0; }
FAKE int cuStreamSynchronize(void*) {
    const std::lock_guard on(lock);
    if (captured != nullptr) return kCapturing;
    log("wait");
    while (!queued.empty()) one();
    return 0;
}
FAKE int cuStreamQuery(void*) {  // a piece of work is done whenever somebody asks
    const std::lock_guard on(lock);
    if (!queued.empty()) one();
    return queued.empty() ? 0 : 600;
}
FAKE int cuMemAlloc_v2(std::uint64_t* out, std::size_t size) {
    const std::lock_guard on(lock);
    std::size_t all = size;
    for (const auto& [address, each] : held) all += each;
    if (const char* memory = std::getenv("FAKE_GPU_MEMORY"); memory != nullptr && all > std::stoull(memory)) return 2;
    log("allocate " + std::to_string(size));
    const std::size_t blocks = (size + kBlock - 1) / kBlock;
    std::vector<std::uint64_t>& again = spare[blocks];
    if (again.empty()) again.push_back(aligned(blocks * kBlock));
    *out = again.back();
    again.pop_back();
    std::memset(reinterpret_cast<void*>(*out), 0xFF, blocks * kBlock);
    held[*out] = size;
    return 0;
}
FAKE int cuMemFree_v2(std::uint64_t address) {
    const std::lock_guard on(lock);
    const auto found = held.find(address);
    if (found == held.end()) std::abort();
    spare[(found->second + kBlock - 1) / kBlock].push_back(address);
    held.erase(found);
    ++num_freed;
    return 0;
}
FAKE int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) { return *free = 1000, *total = 2'000'000, 0; }
FAKE int cuMemAllocHost_v2(void** out, std::size_t size) { return *out = reinterpret_cast<void*>(aligned(size)), 0; }
FAKE int cuMemFreeHost(void* memory) { return std::free(memory), 0; }
FAKE int cuMemcpyHtoDAsync_v2(std::uint64_t to, const void* from, std::size_t size, void*) {
    const std::lock_guard on(lock);
    enqueue([=] { std::memcpy(reinterpret_cast<void*>(to), from, size); });
    return 0;
}
FAKE int cuMemcpyDtoHAsync_v2(void* to, std::uint64_t from, std::size_t size, void*) {
    const std::lock_guard on(lock);
    enqueue([=] { std::memcpy(to, reinterpret_cast<const void*>(from), size); });
    return 0;
}
FAKE int cuMemsetD8Async(std::uint64_t to, unsigned char value, std::size_t size, void*) {
    const std::lock_guard on(lock);
    enqueue([=] { std::memset(reinterpret_cast<void*>(to), value, size); });
    return 0;
}
FAKE int cuStreamBeginCapture_v2(void*, int) {
    const std::lock_guard on(lock);
    captured = new Graph{{}, num_freed};
    return 0;
}
FAKE int cuStreamEndCapture(void*, void** out) {
    const std::lock_guard on(lock);
    log("capture " + std::to_string(captured->work.size()));
    *out = captured;
    captured = nullptr;
    return 0;
}
FAKE int cuGraphInstantiateWithFlags(void** out, void* graph, unsigned long long) {
    return *out = new Graph(*static_cast<Graph*>(graph)), 0;
}
FAKE int cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), 0; }
FAKE int cuGraphExecDestroy(void* graph) {
    const std::lock_guard on(lock);
    log("destroy graph");
    delete static_cast<Graph*>(graph);
    return 0;
}
FAKE int cuGraphLaunch(void* graph, void*) {
    const std::lock_guard on(lock);
    if (static_cast<Graph*>(graph)->num_freed != num_freed) return kInvalid;  // it may copy memory that was freed
    log("graph");
    for (const Work& each : static_cast<Graph*>(graph)->work) queued.push_back(each);
    return 0;
}
FAKE int cuGetErrorName(int, const char** name) { return *name = "CUDA_ERROR_OF_SOME_KIND", 0; }
FAKE int cuGetErrorString(int, const char** text) { return *text = "some kind", 0; }
