// Built with -ffp-contract=off: a fused multiply-add would round once where the specification rounds twice.
#include "noise.hpp"

#include <cmath>

namespace sana {
namespace {

constexpr double kLn2 = 0.6931471805599453;
constexpr double kSqrtHalf = 0.7071067811865476;
constexpr double kRadians = 1.4629180792671596e-09;  // of a turn in 2**32: pi / 2**31
// Ascending powers; each the double nearest to the fraction.
constexpr std::array<double, 10> kLog = {2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9,  2.0 / 11,
                                         2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};
constexpr std::array<double, 8> kSin = {-1.0 / 6,
                                        1.0 / 120,
                                        -1.0 / 5040,
                                        1.0 / 362880,
                                        -1.0 / 39916800.0,
                                        1.0 / 6227020800.0,
                                        -1.0 / 1307674368000.0,
                                        1.0 / 355687428096000.0};
constexpr std::array<double, 8> kCos = {-1.0 / 2,         1.0 / 24,          -1.0 / 720,           1.0 / 40320,
                                        -1.0 / 3628800.0, 1.0 / 479001600.0, -1.0 / 87178291200.0, 1.0 / 20922789888000.0};

template <std::size_t N>
double horner(double z, const std::array<double, N>& ascending) {
    double total = ascending[N - 1];
    for (std::size_t i = N - 1; i-- > 0;) total = total * z + ascending[i];
    return total;
}

double natural_log(double u) {  // of u in (0, 1)
    int exponent = 0;
    double mantissa = std::frexp(u, &exponent);
    if (mantissa < kSqrtHalf) {
        mantissa *= 2.0;
        --exponent;
    }
    const double s = (mantissa - 1.0) / (mantissa + 1.0);
    const double z = s * s;
    return exponent * kLn2 + s * (2.0 + z * horner(z, kLog));
}

struct CosSin {
    double cos, sin;
};

CosSin cos_sin(std::uint32_t turn) {  // of turn / 2**32 of a full turn
    const auto quarter = static_cast<std::uint32_t>((std::uint64_t{turn} + (1u << 29)) >> 30 & 3);
    const auto rest = static_cast<std::int32_t>(turn - (quarter << 30));
    const double a = rest * kRadians;
    const double z = a * a;
    const double s = a + a * (z * horner(z, kSin)), c = 1.0 + z * horner(z, kCos);
    switch (quarter) {
        case 0:
            return {c, s};
        case 1:
            return {-s, c};
        case 2:
            return {-c, -s};
        default:
            return {s, -c};
    }
}

}  // namespace

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> k) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0], p1 = std::uint64_t{0xCD9E8D57} * c[2];
        c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<std::uint32_t>(p1),
             static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<std::uint32_t>(p0)};
        k = {k[0] + 0x9E3779B9, k[1] + 0xBB67AE85};
    }
    return c;
}

std::vector<float> normal(std::uint64_t seed, std::size_t count, std::uint32_t stream) {
    const std::array<std::uint32_t, 2> key = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
    std::vector<float> out(count);
    for (std::size_t block = 0; block * 4 < count; ++block) {
        const auto wide = static_cast<std::uint64_t>(block);
        const auto words = philox4x32({static_cast<std::uint32_t>(wide), static_cast<std::uint32_t>(wide >> 32), stream, 0}, key);
        for (std::size_t pair = 0; pair < 2; ++pair) {
            const double u = (words[2 * pair] * 2.0 + 1.0) * 0x1p-33;
            const double radius = std::sqrt(-2.0 * natural_log(u));
            const CosSin angle = cos_sin(words[2 * pair + 1]);
            const std::size_t at = block * 4 + pair * 2;
            if (at < count) out[at] = static_cast<float>(radius * angle.cos);
            if (at + 1 < count) out[at + 1] = static_cast<float>(radius * angle.sin);
        }
    }
    return out;
}

}  // namespace sana
