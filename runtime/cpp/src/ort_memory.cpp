#include "ort_memory.hpp"

#include <sys/mman.h>

#include <cstdlib>

namespace sana::ort {
namespace {

constexpr std::size_t kHead = 64;           // bytes before a block, which have its size; a block is aligned to as many
constexpr std::size_t kMapped = 128 << 10;  // from here on a block is its own mapping, and goes back to the system when it is freed

void* allocate(Allocator*, std::size_t size) {  // nullptr if there is no memory: ONNX Runtime says so
    if (size == 0 || size > SIZE_MAX - kHead) return nullptr;
    const std::size_t whole = size + kHead;
    void* begin = nullptr;
    if (whole >= kMapped) {  // populated: a fault for each page would cost more
        begin = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (begin == MAP_FAILED) return nullptr;
    } else if (posix_memalign(&begin, kHead, whole) != 0) {
        return nullptr;
    }
    *static_cast<std::size_t*>(begin) = whole;
    return static_cast<char*>(begin) + kHead;
}

void release(Allocator*, void* block) {
    if (block == nullptr) return;
    void* begin = static_cast<char*>(block) - kHead;
    const std::size_t whole = *static_cast<std::size_t*>(begin);
    if (whole >= kMapped) {
        munmap(begin, whole);
    } else {
        std::free(begin);
    }
}

const MemoryInfo* memory_of(const Allocator* allocator) { return allocator->memory; }

}  // namespace

void use_system_memory(const void* const* table, Env* env) {
    static Allocator allocator{kApiVersion, allocate, release, memory_of, nullptr};  // as long as the library, which is for good
    MemoryInfo* memory = nullptr;
    Status* status = CreateCpuMemoryInfo::call(table, kDeviceAllocator, kDefaultMemory, &memory);
    allocator.memory = memory;
    if (status == nullptr) status = RegisterAllocator::call(table, env, &allocator);
    // The program that this is embedded in may have registered one of its own with the same library: that one serves as well.
    if (status != nullptr) ReleaseStatus::call(table, status);
}

}  // namespace sana::ort
