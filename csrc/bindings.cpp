// The pybind11 module rcmstr_fast._C: argument passing and nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "augment.h"
#include "lmdb_reader.h"
#include "loss_rows.h"
#include "rows.h"
#include "sites.h"

namespace py = pybind11;

namespace {

// One bytes object or None a key; the tree is walked and the values are copied without the GIL.
template <class KeyAt>
py::list lmdb_values(const rcmstr::LmdbReader& reader, size_t count, KeyAt key_at) {
  std::vector<std::optional<std::string_view>> values(count);
  {
    py::gil_scoped_release release;
    for (size_t i = 0; i < count; ++i) values[i] = reader.find(key_at(i));
  }
  py::list result(count);
  std::vector<char*> targets(count, nullptr);
  for (size_t i = 0; i < count; ++i) {
    if (!values[i]) {
      result[i] = py::none();
      continue;
    }
    PyObject* made = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(values[i]->size()));
    if (!made) throw py::error_already_set();
    PyList_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), made);
    targets[i] = PyBytes_AS_STRING(made);
  }
  {
    py::gil_scoped_release release;
    for (size_t i = 0; i < count; ++i)
      if (targets[i]) std::memcpy(targets[i], values[i]->data(), values[i]->size());
  }
  return result;
}

using Numbers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// The keys KIND-000000001, .. of record numbers with that many digits or more, written one after the other into the same place.
class RecordKeys {
 public:
  RecordKeys(const std::string& kind, const Numbers& numbers, int digits)
      : key_(kind + "-"), digits_(digits), numbers_(numbers.data()) {
    if (digits < 1 || digits > 18) throw std::invalid_argument("records: digits must be in 1..18");
    stem_ = key_.size();
    key_.resize(stem_ + 24);
    for (int i = 0; i < digits; ++i) limit_ *= 10;
  }
  std::string_view operator()(size_t i) {
    char* const digits = key_.data() + stem_;
    int64_t number = numbers_[i];
    if (number < 0 || number >= limit_)
      return {key_.data(), stem_ + static_cast<size_t>(std::snprintf(digits, 24, "%lld", (long long)number))};
    for (int place = digits_ - 1; place >= 0; --place, number /= 10) digits[place] = static_cast<char>('0' + number % 10);
    return {key_.data(), stem_ + static_cast<size_t>(digits_)};
  }

 private:
  std::string key_;
  size_t stem_;
  int digits_;
  int64_t limit_ = 1;  // the first number of more digits
  const int64_t* numbers_;
};

void bind_lmdb(py::module_& m) {
  using rcmstr::LmdbReader;
  const auto& error = py::register_exception<rcmstr::LmdbError>(m, "LmdbError", PyExc_RuntimeError);
  py::register_exception<rcmstr::LmdbUnsupported>(m, "LmdbUnsupported", error);
  py::class_<LmdbReader>(m, "LmdbReader")
      .def(py::init<const std::string&>(), py::arg("data_file"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("entries", &LmdbReader::entries)
      .def_property_readonly("lost_pages", &LmdbReader::lost_pages)
      .def_property_readonly("damaged", &LmdbReader::damaged)
      .def("largest_number", &LmdbReader::largest_number, py::arg("kind"), py::call_guard<py::gil_scoped_release>())
      .def("get",
           [](const LmdbReader& reader, const std::vector<std::string>& keys) {
             return lmdb_values(reader, keys.size(), [&](size_t i) { return std::string_view(keys[i]); });
           },
           py::arg("keys"))
      .def("records",
           [](const LmdbReader& reader, const std::string& kind, const Numbers& numbers, int digits) {
             return lmdb_values(reader, static_cast<size_t>(numbers.size()), RecordKeys(kind, numbers, digits));
           },
           py::arg("kind"), py::arg("numbers"), py::arg("digits") = 9)
      .def("survey",
           [](const LmdbReader& reader, const std::string& kind, int digits, uint64_t first, uint64_t last) {
             LmdbReader::Survey found;
             {
               py::gil_scoped_release release;
               found = reader.survey(kind, digits, first, last);
             }
             return std::make_tuple(found.total, found.formed, found.lowest, found.highest, found.inside);
           },
           py::arg("kind"), py::arg("digits"), py::arg("first"), py::arg("last"))
      .def("first_key",
           [](const LmdbReader& reader, const py::bytes& prefix) -> py::object {
             const std::optional<std::string> key = reader.first_key(std::string(prefix));
             return key ? py::object(py::bytes(*key)) : py::object(py::none());
           },
           py::arg("prefix"))
      .def("prefetch",
           [](const LmdbReader& reader, const std::string& kind, const Numbers& numbers, int digits) {
             RecordKeys keys(kind, numbers, digits);
             py::gil_scoped_release release;
             reader.prefetch(static_cast<size_t>(numbers.size()), [&](size_t i) { return keys(i); });
           },
           py::arg("kind"), py::arg("numbers"), py::arg("digits") = 9);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Tensors come as addresses (`Tensor.data_ptr()`); rcmstr_fast/ops/augment_views has checked them.
void bind_augment(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("augment_draw",
        [](uintptr_t index, uintptr_t rows, int64_t views, int64_t batch, uint64_t seed, uint32_t epoch,
           uint32_t first_stream, uintptr_t preset, int threads) {
          rcmstr::draw_parameters(pointer<int64_t>(index), pointer<float>(rows), views, batch, seed, epoch,
                                  first_stream, *pointer<rcmstr::Preset>(preset), threads);
        },
        release());
  m.def("augment_views",
        [](uintptr_t images, uintptr_t rows, uintptr_t out, int64_t views, int64_t batch, int height, int width,
           bool bfloat16, uintptr_t places, int patches, int threads) {
          rcmstr::apply_parameters(pointer<uint8_t>(images), pointer<float>(rows), pointer<void>(out),
                                   {views, batch, height, width}, {bfloat16, pointer<int64_t>(places), patches},
                                   threads);
        },
        release());
#ifdef RCMSTR_FAST_CUDA
  m.def("augment_draw_cuda",
        [](uintptr_t index, uintptr_t rows, int64_t views, int64_t batch, uint64_t seed, uint32_t epoch,
           uint32_t first_stream, uintptr_t preset, uintptr_t stream) {
          rcmstr::draw_parameters_cuda(pointer<int64_t>(index), pointer<float>(rows), views, batch, seed, epoch,
                                       first_stream, *pointer<rcmstr::Preset>(preset),
                                       pointer<void>(stream));
        },
        release());
  m.def("augment_views_cuda",
        [](uintptr_t images, uintptr_t rows, uintptr_t out, int64_t views, int64_t batch, int height, int width,
           bool bfloat16, uintptr_t places, int patches, uintptr_t stream) {
          rcmstr::apply_parameters_cuda(pointer<uint8_t>(images), pointer<float>(rows), pointer<void>(out),
                                        {views, batch, height, width}, {bfloat16, pointer<int64_t>(places), patches},
                                        pointer<void>(stream));
        },
        release());
#endif
}

// Site lists and work on packed rows; rcmstr_fast/ops/packed.py has checked the tensors.
void bind_sites(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("list_sites",
        [](uintptr_t active, int64_t images, int64_t sites, uintptr_t positions, uintptr_t index, uintptr_t starts) {
          return rcmstr::list_sites(pointer<bool>(active), images, sites, pointer<int32_t>(positions),
                                    pointer<int32_t>(index), pointer<int32_t>(starts));
        },
        release());
  m.def("window_tables",
        [](const std::array<int, 10>& w, uintptr_t positions, int64_t outputs, uintptr_t in_index, int64_t inputs,
           uintptr_t table, uintptr_t inverse, int threads) {
          rcmstr::window_tables({w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9]},
                                pointer<int32_t>(positions), outputs, pointer<int32_t>(in_index), inputs,
                                pointer<int32_t>(table), pointer<int32_t>(inverse), threads);
        },
        release());
  m.def("list_pairs",
        [](uintptr_t table, int64_t outputs, int64_t inputs, int taps, uintptr_t in_row, uintptr_t out_row,
           uintptr_t starts, uintptr_t of_output, uintptr_t of_input) {
          return rcmstr::list_pairs(pointer<int32_t>(table), outputs, inputs, taps, pointer<int32_t>(in_row),
                                    pointer<int32_t>(out_row), pointer<int64_t>(starts), pointer<int32_t>(of_output),
                                    pointer<int32_t>(of_input));
        },
        release());
  using Job = std::tuple<std::array<uintptr_t, 2>, std::array<int, 10>, bool, std::array<uintptr_t, 4>>;
  const auto jobs_of = [](const std::vector<Job>& given) {
    if (given.size() > rcmstr::kMaxJobs) throw std::invalid_argument("list_jobs: too many jobs");
    std::vector<rcmstr::SiteJob> jobs;
    for (const auto& [maps, w, inverse, out] : given)
      jobs.push_back({pointer<bool>(maps[0]), pointer<bool>(maps[1]),
                      {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9]}, inverse, pointer<int32_t>(out[0]),
                      pointer<int32_t>(out[1]), pointer<int32_t>(out[2]), pointer<int32_t>(out[3])});
    return jobs;
  };
  m.def("list_jobs",
        [jobs_of](const std::vector<Job>& given, int64_t images) {
          const auto jobs = jobs_of(given);
          rcmstr::list_jobs(jobs.data(), static_cast<int>(jobs.size()), images);
        },
        release());
#ifdef RCMSTR_FAST_CUDA
  m.def("cuda_refusal", &rcmstr::cuda_refusal, release());
  m.def("list_jobs_cuda",
        [jobs_of](const std::vector<Job>& given, int64_t images, uintptr_t stream) {
          const auto jobs = jobs_of(given);
          rcmstr::list_jobs_cuda(jobs.data(), static_cast<int>(jobs.size()), images, pointer<void>(stream));
        },
        release());
#endif
  m.def("gather_rows",
        [](uintptr_t source, uintptr_t index, uintptr_t out, int64_t n, int64_t bytes, int threads) {
          rcmstr::gather_rows(pointer<void>(source), pointer<int32_t>(index), pointer<void>(out), n, bytes, threads);
        },
        release());
}

// T: the rows, W: statistics and parameters; the functions are called <name>_<suffix>.
template <class T, class W>
void bind_rows(py::module_& m, const std::string& suffix) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(("sum_rows_" + suffix).c_str(),
        [](uintptr_t source, uintptr_t table, uintptr_t out, int64_t n, int taps, int64_t channels, int threads) {
          rcmstr::sum_rows(pointer<T>(source), pointer<int32_t>(table), pointer<T>(out), n, taps, channels, threads);
        },
        release());
  m.def(("max_rows_" + suffix).c_str(),
        [](uintptr_t source, uintptr_t table, uintptr_t out, uintptr_t which, int64_t n, int taps, int64_t channels,
           int threads) {
          rcmstr::max_rows(pointer<T>(source), pointer<int32_t>(table), pointer<T>(out), pointer<int8_t>(which), n,
                           taps, channels, threads);
        },
        release());
  m.def(("max_rows_backward_" + suffix).c_str(),
        [](uintptr_t grad_out, uintptr_t which, uintptr_t inverse, uintptr_t grad, int64_t n, int taps,
           int64_t channels, int threads) {
          rcmstr::max_rows_backward(pointer<T>(grad_out), pointer<int8_t>(which), pointer<int32_t>(inverse),
                                    pointer<T>(grad), n, taps, channels, threads);
        },
        release());
  m.def(("norm_rows_" + suffix).c_str(),
        [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out, uintptr_t mean,
           uintptr_t rstd, uintptr_t var, const std::vector<int64_t>& starts, int64_t channels, double eps, bool relu,
           int threads) {
          rcmstr::norm_rows(pointer<T>(x), pointer<W>(weight), pointer<W>(bias), pointer<T>(residual), pointer<T>(out),
                            pointer<W>(mean), pointer<W>(rstd), pointer<W>(var),
                            {starts.data(), static_cast<int64_t>(starts.size()) - 1}, channels, eps, relu, threads);
        },
        release());
  m.def(("norm_rows_backward_" + suffix).c_str(),
        [](uintptr_t grad_out, uintptr_t x, uintptr_t out, uintptr_t weight, uintptr_t mean, uintptr_t rstd,
           uintptr_t grad_x, uintptr_t grad_residual, uintptr_t grad_weight, uintptr_t grad_bias,
           const std::vector<int64_t>& starts, int64_t channels, int threads) {
          rcmstr::norm_rows_backward(pointer<T>(grad_out), pointer<T>(x), pointer<T>(out), pointer<W>(weight),
                                     pointer<W>(mean), pointer<W>(rstd), pointer<T>(grad_x), pointer<T>(grad_residual),
                                     pointer<W>(grad_weight), pointer<W>(grad_bias),
                                     {starts.data(), static_cast<int64_t>(starts.size()) - 1}, channels, threads);
        },
        release());
}

void bind_loss_rows(py::module_& m) {
  m.def("loss_rows",
        [](uintptr_t a, uintptr_t b, uintptr_t p, uintptr_t place, uintptr_t positive, uintptr_t weight, uintptr_t info,
           uintptr_t rest, uintptr_t kl, int64_t rows, int64_t keys, float ratio, float scale_info, float scale_kl,
           int threads) {
          rcmstr::loss_rows({pointer<float>(a), pointer<float>(b), pointer<float>(p), pointer<int64_t>(place),
                             pointer<float>(positive), pointer<float>(weight), pointer<float>(info),
                             pointer<float>(rest), pointer<float>(kl), rows, keys, ratio, scale_info, scale_kl},
                            threads);
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled host (and, where nvcc was found, CUDA) functions of rcmstr_fast.";
#ifdef RCMSTR_FAST_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  // LMDB reader
  bind_lmdb(m);

  // Augmentation
  bind_augment(m);

  // Masked convolution
  bind_sites(m);
  bind_rows<float, float>(m, "float32");
  bind_rows<double, double>(m, "float64");
  bind_rows<rcmstr::bfloat16, float>(m, "bfloat16");
  bind_loss_rows(m);
}
