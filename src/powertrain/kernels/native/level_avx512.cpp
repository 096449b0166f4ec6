#include <immintrin.h>
#include "level.hpp"

namespace powertrain::avx512 {
#include "simd_avx512.hpp"

#include "level.inc"

}  // namespace powertrain::avx512

namespace powertrain {

const Level& avx512_level() {
    static constexpr Level table = avx512::level("avx512");
    return table;
}

}  // namespace powertrain
