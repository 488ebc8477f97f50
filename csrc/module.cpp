// The Python module. Importing it registers the operators (static initialisers of csrc/torch);
// pybind11 itself carries introspection only.
#include <pybind11/pybind11.h>

#include <string>

#include "build_info.h"
#include "cpu/common/isa.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = MTP_VERSION;
  info["commit"] = MTP_COMMIT;
  info["torch"] = MTP_TORCH_VERSION;
  info["cuda"] = MTP_CUDA_VERSION;
  info["cuda_archs"] = MTP_CUDA_ARCHS;
  info["compiler"] = MTP_CXX_COMPILER;
  info["cutlass"] = MTP_CUTLASS_VERSION;
  info["cpu_isa_compiled"] = mtp::cpu::compiled_isa_levels();
  info["cpu_isa"] = mtp::cpu::isa_name(mtp::cpu::isa());
  return info;
}

}  // namespace

PYBIND11_MODULE(MTP_MODULE_NAME, m) {
  m.doc() = "Operators of mtp_ext; see mtp_ext.ops for the documented functions.";
  m.def("build_info", &build_info,
        "Versions, compiled CUDA architectures and CPU instruction-set levels, as a dict of str.");
}
