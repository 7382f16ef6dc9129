// A second device on the CPU (PrivateUse1, "fakedev"): its memory and its kernels are the CPU's, but
// mixing devices raises as on CUDA, and what would make the host wait for a GPU is counted by kind.
// What it cannot see is listed in __init__.py. Only single headers of ATen are included: those of
// torch/extension.h take seven times as long to compile.
#define AT_PER_OPERATOR_HEADERS
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_copy_from_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/CPUGeneratorImpl.h>
#include <atomic>
#include <map>
#include <mutex>
#include <set>

namespace py = pybind11;
namespace {
using at::Tensor;
constexpr auto DEV = c10::DeviceType::PrivateUse1;
std::mutex lock_;
std::map<std::string, int64_t> counts;  // "kind op" -> times
thread_local int quiet = 0;  // inside a fallback: copies are not the user's
struct Quiet { Quiet() { ++quiet; } ~Quiet() { --quiet; } };

py::object* tracer = nullptr;
void note(const char* kind, const std::string& what) {
  if (quiet) return;
  {
    std::lock_guard<std::mutex> g(lock_);
    counts[std::string(kind) + " " + what]++;
  }
  if (tracer && strcmp(kind, "op") != 0) {
    py::gil_scoped_acquire gil;
    (*tracer)(std::string(kind), what);
  }
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEV; }
  c10::Device exchangeDevice(c10::Device) const override { return {DEV, 0}; }
  c10::Device getDevice() const override { return {DEV, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, {DEV, 0}); }
  c10::Stream getDefaultStream(c10::Device) const override { return getStream({DEV, 0}); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream({DEV, 0}); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Alloc final : c10::Allocator {
  static void free_(void* p) { c10::free_cpu(p); }
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? c10::alloc_cpu(n) : nullptr;
    return {p, p, &free_, c10::Device(DEV, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_; }
  void copy_data(void* d, const void* s, size_t n) const override { std::memcpy(d, s, n); }
};
Alloc alloc_;
REGISTER_ALLOCATOR(DEV, &alloc_);

struct Gen final : at::CPUGeneratorImpl {
  Gen() : at::CPUGeneratorImpl(c10::detail::getNonDeterministicRandom()) {
    device_ = c10::Device(DEV, 0);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Device getDeviceFromPtr(void*) const override { return {DEV, 0}; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator g = at::make_generator<Gen>();
    return g;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Gen>(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto* impl = s.unsafeGetStorageImpl();
    auto fresh = alloc_.allocate(n);
    if (impl->data()) std::memcpy(fresh.get(), impl->data(), std::min(n, impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(fresh));
    impl->set_nbytes(n);
  }
};

// The same memory, as a CPU tensor.
Tensor on_cpu(const Tensor& t) {
  if (!t.defined() || t.device().type() != DEV) return t;
  auto storage = t.storage();
  auto ptr = c10::DataPtr(storage.mutable_data(), new c10::Storage(storage),
      [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::Device(c10::kCPU));
  auto impl = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(ptr), c10::GetCPUAllocator(), false);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(impl), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  out.unsafeGetTensorImpl()->set_storage_offset(t.storage_offset());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
  return out;
}

Tensor empty_(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
              std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> f) {
  return at::detail::empty_generic(size, &alloc_, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      dtype.value_or(at::get_default_dtype_as_scalartype()), f);
}
Tensor empty_strided_(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                      std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &alloc_,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype.value_or(at::get_default_dtype_as_scalartype()));
}
Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  const bool from = self.device().type() == DEV, to = dst.device().type() == DEV;
  if (self.numel() == 0) note("op", "copy_");  // nothing is copied
  else if (from && !to) note("sync", "D2H copy");
  else if (!from && to) note(non_blocking ? "h2d-async" : "sync", "H2D copy");
  else note("op", "copy_");
  Quiet q;
  at::AutoDispatchBelowADInplaceOrView g;
  on_cpu(dst).copy_(on_cpu(self));
  return dst;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  Quiet q;
  dst.resize_(self.sizes());
  on_cpu(dst).copy_(on_cpu(self));
  return dst;
}
at::Scalar local_scalar(const Tensor& self) {
  note("sync", "item/bool/int of a tensor");
  Quiet q;
  return on_cpu(self).item();
}
const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> f) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (sizes == self.sizes()) return self;  // a view keeps its strides
  int64_t n = 1; for (auto s : sizes) n *= s;
  size_t bytes = (n + self.storage_offset()) * self.itemsize();
  if (bytes > self.storage().nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

// Ops that let a CPU tensor in beside one of the device, as CUDA's do.
const std::set<std::string> INDEXED = {"aten::index.Tensor", "aten::index_put_", "aten::index_put",
  "aten::_index_put_impl_", "aten::index.Tensor_out", "aten::_unsafe_index.Tensor", "aten::_unsafe_index_put"};
// Ops that do not go through TensorIterator: no 0-dim CPU tensor either.
const std::set<std::string> STRICT = {"aten::cat", "aten::stack", "aten::gather", "aten::scatter",
  "aten::scatter_", "aten::scatter_add", "aten::scatter_add_", "aten::index_select", "aten::embedding",
  "aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::index_add", "aten::index_add_",
  "aten::searchsorted", "aten::masked_scatter", "aten::masked_scatter_", "aten::index_fill_", "aten::index_copy_",
  "aten::equal", "aten::masked_select", "aten::take_along_dim", "aten::dot"};
const std::set<std::string> WAITS = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
  "aten::unique_consecutive", "aten::equal", "aten::is_nonzero", "aten::_unique", "aten::nonzero_out", "aten::bincount",
  "aten::unique_dim_consecutive", "aten::histc"};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto full = schema.overload_name().empty() ? name : name + "." + schema.overload_name();
  const auto n = schema.arguments().size();
  const auto begin = stack->size() - n;
  bool dev = false, boolean = false;
  std::vector<std::pair<int, Tensor>> cpu;
  auto look = [&](int arg, const Tensor& t) {
    if (!t.defined()) return;
    if (t.device().type() == DEV) dev = true;
    else if (t.device().is_cpu()) cpu.emplace_back(arg, t);
    if (arg == 1 && t.scalar_type() == at::kBool) boolean = true;  // an index
    if (arg == 2 && t.numel() == 1) boolean = false;  // a single value is put by masked_fill
  };
  for (size_t i = 0; i < n; ++i) {
    const auto& v = (*stack)[begin + i];
    if (v.isTensor()) look(i, v.toTensor());
    else if (v.isTensorList()) for (const Tensor& t : v.toTensorVector()) look(i, t);
    else if (v.isOptionalTensorList()) { for (const auto& t : v.toOptionalTensorVector()) if (t) look(i, *t); }
    else if (v.isList()) { for (const auto& e : v.toListRef()) if (e.isTensor()) look(i, e.toTensor()); }
    if (v.type()->kind() == c10::TypeKind::GeneratorType && !v.isNone()) {
      auto g = v.toGenerator();
      TORCH_CHECK(!g.defined() || g.device().type() == DEV,
        "fakedev: Expected a 'fakedev' device type for generator but found '", g.device().type(), "' in ", full);
      (*stack)[begin + i] = c10::IValue();
    }
  }
  if (dev && !quiet) for (auto& [arg, t] : cpu) {
    if (INDEXED.count(full) || INDEXED.count(name)) {
      if (arg == 1) continue;                      // indices may be on the CPU
      if (arg == 2 && t.dim() == 0) continue;      // a single value
    } else if (t.dim() == 0 && !STRICT.count(name)) {
      const auto* alias = schema.arguments()[arg].alias_info();
      if (!(alias && alias->isWrite())) continue;
    } else if (name.rfind("aten::_foreach", 0) == 0 || name.rfind("aten::_fused_adam", 0) == 0) continue;
    TORCH_CHECK(false, "fakedev: Expected all tensors to be on the same device, but argument ", arg,
                " of ", full, " is on the CPU (shape ", t.sizes(), ")");
  }
  if (WAITS.count(name)) note("sync", full);
  else if ((INDEXED.count(full) || INDEXED.count(name)) && boolean) note("sync", full + " by a bool mask");
  else if (name == "aten::repeat_interleave") note("sync", full);
  else note("op", full);
  Quiet q;
  at::native::cpu_fallback(op, stack);
}
Tensor& fill_(Tensor& self, const at::Scalar& v) { note("op", "aten::fill_"); Quiet q; on_cpu(self).fill_(v); return self; }
Tensor& zero_(Tensor& self) { note("op", "aten::zero_"); Quiet q; on_cpu(self).zero_(); return self; }
}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_);
  m.impl("empty_strided", &empty_strided_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize_);
  m.impl("fill_.Scalar", &fill_);
  m.impl("zero_", &zero_);
  m.impl("set_.source_Storage",
         static_cast<Tensor& (*)(Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset",
         static_cast<Tensor& (*)(Tensor&, at::Storage, int64_t, c10::IntArrayRef, c10::IntArrayRef)>(&at::native::set_storage_cpu_));
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32_set_opt_dtype)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32_set_opt_dtype)
  KERNEL_PRIVATEUSEONE(logsumexp, fp32)
  KERNEL_PRIVATEUSEONE(cumsum, fp32)
}

PYBIND11_MODULE(EXTENSION, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("counts", [] { std::lock_guard<std::mutex> g(lock_); return counts; });
  m.def("reset", [] { std::lock_guard<std::mutex> g(lock_); counts.clear(); });
  m.def("set_tracer", [](py::object f) {
    delete tracer; tracer = f.is_none() ? nullptr : new py::object(f);
  });
}
