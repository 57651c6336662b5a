// The pybind11 module rcmstr_fast._C: argument passing and nothing else.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled host (and, where nvcc was found, CUDA) functions of rcmstr_fast.";
#ifdef RCMSTR_FAST_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
