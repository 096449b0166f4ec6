#include <immintrin.h>
#include "level.hpp"

namespace powertrain::avx2 {
#include "simd_avx2.hpp"

#include "level.inc"

}  // namespace powertrain::avx2

namespace powertrain {

const Level& avx2_level() {
    static constexpr Level table = avx2::level("avx2");
    return table;
}

}  // namespace powertrain
