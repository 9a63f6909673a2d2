// fp16 and bf16 as bits, on a CPU: round to nearest even, with subnormals, infinities and NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace star {

inline uint32_t bits_of(float x)
{
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits)
{
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float float_from_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t bfloat16_from_float(float x)
{
    uint32_t const bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float_from_half(uint16_t half)
{
    uint32_t const sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
    if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    float const small = float(mantissa) * 0x1p-24f;
    return sign ? -small : small;
}

inline uint16_t half_from_float(float x)
{
    uint32_t const bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
    if (magnitude < 0x38800000) {  // subnormal: in units of 2^-24, rounded by the addition
        float const shifted = float_of(magnitude) + 0.5f;
        return uint16_t(sign | (bits_of(shifted) - bits_of(0.5f)));
    }
    return uint16_t(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}

}  // namespace star
