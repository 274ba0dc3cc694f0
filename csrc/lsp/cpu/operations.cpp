#include "lsp/cpu/operations.h"

namespace fastkd::cpu {
FASTKD_DEFINE_ISAS(FASTKD_LSP_OPERATIONS)
}
