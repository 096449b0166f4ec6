#include "level.hpp"

namespace powertrain::portable {
#include "simd_portable.hpp"

#include "level.inc"

}  // namespace powertrain::portable

namespace powertrain {

const Level& portable_level() {
    static constexpr Level table = portable::level("portable");
    return table;
}

}  // namespace powertrain
