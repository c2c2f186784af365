// Floats of 16 bits in 32, exactly, and back. As runtime/bfloat16.py, and NumPy for the other.
#pragma once

#include <bit>
#include <cstdint>

namespace sana {

inline float from_half(std::uint16_t bits) {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16, exponent = bits >> 10 & 0x1FU, rest = bits & 0x3FFU;
    if (exponent == 0) {  // zero, or below the smallest normal number: a multiple of 2^-24
        const float size = static_cast<float>(rest) * 0x1p-24f;
        return std::bit_cast<float>(std::bit_cast<std::uint32_t>(size) | sign);
    }
    return std::bit_cast<float>(sign | (exponent == 31 ? 0xFFU : exponent + 112) << 23 | rest << 13);
}

inline float from_bfloat16(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

inline std::uint16_t to_bfloat16(float value) {  // the nearest, ties to even; no NaN
    const auto bits = std::bit_cast<std::uint32_t>(value);
    return static_cast<std::uint16_t>((bits + (0x7FFFU + (bits >> 16 & 1U))) >> 16);
}

}  // namespace sana
