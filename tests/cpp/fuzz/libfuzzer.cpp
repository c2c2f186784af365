// The entry that libFuzzer calls: one program a target, SANA_FUZZ_TARGET.
#include <cstddef>
#include <cstdint>

#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    SANA_FUZZ_TARGET({reinterpret_cast<const char*>(data), size});
    return 0;
}
