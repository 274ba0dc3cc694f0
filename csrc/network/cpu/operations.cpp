// The choice of the instruction set for what planes.h and planes_backward.h list.
#include "network/cpu/planes_backward.h"

namespace fastkd::cpu {
FASTKD_DEFINE_ISAS(FASTKD_PLANE_OPERATIONS)
FASTKD_DEFINE_ISAS(FASTKD_PLANE_BACKWARD_OPERATIONS)
}  // namespace fastkd::cpu
