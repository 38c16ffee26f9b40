// An accelerator whose memory is the CPU's, under the name of a real one: two CUDA devices or, with
// -DEMULATE_MPS, one MPS device, in a build of torch that has neither. Its values are those of the
// CPU's kernels; devices are checked as the real one checks them; it reports every wait of the host.
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <atomic>
#include <map>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

namespace emulated {

using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::DispatchKeySet;

#ifdef EMULATE_MPS
#define KEY MPS
constexpr bool is_mps = true;
constexpr int num_devices = 1;
#else
#define KEY CUDA
constexpr bool is_mps = false;
constexpr int num_devices = 2;
#endif
constexpr auto type = c10::DeviceType::KEY;
constexpr auto key = c10::DispatchKey::KEY;

thread_local DeviceIndex current = 0;

// ---- waits of the host, reported to Python ----------------------------------------------------

PyObject* on_wait = nullptr;

void wait(const std::string& what) {
  if (on_wait == nullptr) return;
  py::gil_scoped_acquire gil;
  PyObject* done = PyObject_CallFunction(on_wait, "s", what.c_str());
  if (done == nullptr) PyErr_Clear();
  Py_XDECREF(done);
}

// ---- memory -----------------------------------------------------------------------------------

void release(void* p) { c10::free_cpu(p); }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n == 0 ? nullptr : c10::alloc_cpu(n);
    return {p, p, &release, Device(type, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
Allocator allocator;

std::mutex pinned_mutex;
std::map<const void*, size_t> pinned;

void release_pinned(void* p) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  pinned.erase(p);
  c10::free_cpu(p);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n == 0 ? nullptr : c10::alloc_cpu(n);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    if (p != nullptr) pinned[p] = n;
    return {p, p, &release_pinned, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* p) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned.upper_bound(p);
  if (after == pinned.begin()) return false;
  auto found = std::prev(after);
  return static_cast<const char*>(p) < static_cast<const char*>(found->first) + found->second;
}

// ---- generators: the CPU's algorithm, with a state per device ---------------------------------

struct Generator final : c10::GeneratorImpl {
  at::Generator cpu;
  explicit Generator(DeviceIndex i, std::optional<at::Generator> from = std::nullopt)
      : c10::GeneratorImpl(Device(type, i), DispatchKeySet(key)),
        cpu(from ? *from : at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(device_.index(), cpu.clone()); }
};

const at::Generator& default_generator(DeviceIndex i) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int d = 0; d < num_devices; ++d) made.push_back(at::make_generator<Generator>(d));
    return made;
  }();
  return all.at(i < 0 ? current : i);
}

at::Generator cpu_generator(const at::Generator& g) {
  return static_cast<Generator*>(g.unsafeGetGeneratorImpl())->cpu;
}

// ---- guard and hooks --------------------------------------------------------------------------

std::atomic<c10::StreamId> next_stream{1};
thread_local c10::StreamId streams[num_devices] = {0};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return emulated::type; }
  Device full(Device d) const { return {emulated::type, d.has_index() ? d.index() : current}; }
  Device exchangeDevice(Device d) const override { return {emulated::type, std::exchange(current, full(d).index())}; }
  Device getDevice() const override { return {emulated::type, current}; }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() < num_devices, "CUDA error: invalid device ordinal");
    current = full(d).index();
  }
  void uncheckedSetDevice(Device d) const noexcept override { current = full(d).index(); }
  c10::Stream stream(Device d, c10::StreamId id) const { return c10::Stream(c10::Stream::UNSAFE, full(d), id); }
  c10::Stream getStream(Device d) const override { return stream(d, streams[full(d).index()]); }
  c10::Stream getDefaultStream(Device d) const override { return stream(d, 0); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return stream(d, next_stream++); }
  c10::Stream getNewStream(Device d, int) const override { return stream(d, next_stream++); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    return stream(s.device(), std::exchange(streams[s.device().index()], s.id()));
  }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait("synchronize"); }
  void synchronizeEvent(void*) const override { wait("synchronize"); }
  void synchronizeDevice(const DeviceIndex) const override { wait("synchronize"); }
  DeviceIndex deviceCount() const noexcept override { return num_devices; }
};
C10_REGISTER_GUARD_IMPL(KEY, Guard)

#ifdef EMULATE_MPS
struct Hooks final : at::MPSHooksInterface {
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  at::Allocator* getMPSDeviceAllocator() const override { return &allocator; }
  void deviceSynchronize() const override { wait("synchronize"); }
  void emptyCache() const override {}
#else
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  DeviceIndex current_device() const override { return current; }
  at::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  int getNumGPUs() const override { return num_devices; }
  void deviceSynchronize(DeviceIndex) const override { wait("synchronize"); }
#endif
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return num_devices; }
  void setCurrentDevice(DeviceIndex d) const override { current = d; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return std::exchange(current, d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return std::exchange(current, d); }
  const at::Generator& getDefaultGenerator(DeviceIndex i) const override { return default_generator(i); }
  at::Generator getNewGenerator(DeviceIndex i) const override {
    return at::make_generator<Generator>(i < 0 ? current : i);
  }
  Device getDeviceFromPtr(void*) const override { return {type, current}; }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};

// torch made hooks without a device when it was imported. They hold no data, so the table of virtual
// functions of ours makes them ours.
void take_hooks() {
#ifdef EMULATE_MPS
  static const Hooks hooks;
  const void* live = &at::detail::getMPSHooks();
#else
  static const Hooks hooks{at::CUDAHooksArgs{}};
  const void* live = &at::detail::getCUDAHooks();
#endif
  std::memcpy(const_cast<void*>(live), static_cast<const void*>(&hooks), sizeof(void*));
}

// ---- a tensor of the same memory on the other device ------------------------------------------

bool ours(const Tensor& t) { return t.defined() && t.device().type() == type; }

void refuse_float64(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      !is_mps || (dtype != at::kDouble && dtype != at::kComplexDouble),
      "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
      "Please use float32 instead.");
}

Tensor alias(const Tensor& t, Device device, c10::Allocator* from, c10::DispatchKey as) {
  const c10::Storage& storage = t.storage();
  c10::DataPtr data(
      storage.mutable_data(), new c10::Storage(storage),
      [](void* s) { delete static_cast<c10::Storage*>(s); }, device);
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), from, true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(same), DispatchKeySet(as), t.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (t.is_conj()) out._set_conj(true);
  if (t.is_neg()) out._set_neg(true);
  return out;
}

Tensor on_cpu(const Tensor& t) {
  return alias(t, Device(c10::DeviceType::CPU), c10::GetAllocator(c10::DeviceType::CPU), c10::DispatchKey::CPU);
}

Tensor on_device(const Tensor& t, Device device) {
  if (!t.defined() || !t.device().is_cpu()) return t;
  refuse_float64(t.scalar_type());
  return alias(t, device, &allocator, key);
}

struct Lent {  // a tensor of the device, and the CPU's tensor that a kernel sees in its place
  Tensor mine, cpu;
  void take_back() const {  // where a kernel gave an output another memory or shape
    if (cpu.storage().data() != mine.storage().data()) {
      auto fresh = on_device(cpu, mine.device());
      auto* to = mine.storage().unsafeGetStorageImpl();
      to->set_data_ptr(std::move(fresh.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
      to->set_nbytes(fresh.storage().nbytes());
    }
    if (cpu.sizes() != mine.sizes() || cpu.strides() != mine.strides() ||
        cpu.storage_offset() != mine.storage_offset()) {
      mine.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
};

// ---- every kernel: devices are checked, then the CPU's kernel runs on the same memory ------------

std::unordered_set<std::string> unchecked;  // kernels that let a scalar of the CPU pass
std::unordered_set<std::string> existing;  // kernels that the real device has
std::unordered_map<std::string, int> waiting;  // kernels that wait for the device, and how often

struct Kernel {
  std::string name;
  bool is_unchecked, exists, is_indexing, is_dropout;
  int waits;
  std::vector<bool> takes_generator;
};

const Kernel& kernel_of(const c10::OperatorHandle& op) {
  static std::mutex mutex;
  static std::unordered_map<const c10::FunctionSchema*, Kernel> all;
  std::lock_guard<std::mutex> lock(mutex);
  const auto& schema = op.schema();
  auto found = all.find(&schema);
  if (found != all.end()) return found->second;
  Kernel k;
  k.name = c10::toString(schema.operator_name());
  k.is_unchecked = unchecked.count(k.name) > 0;
  k.exists = k.name.rfind("aten::", 0) != 0 || existing.count(k.name) > 0;
  k.is_indexing = k.name.rfind("aten::index.", 0) == 0 || k.name.rfind("aten::index_put", 0) == 0 ||
      k.name.rfind("aten::_index_put_impl_", 0) == 0 || k.name.rfind("aten::_unsafe_index.", 0) == 0;
  k.is_dropout = k.name.find("dropout") != std::string::npos;
  k.waits = waiting.count(k.name) ? waiting[k.name] : 0;
  for (const auto& argument : schema.arguments()) {
    k.takes_generator.push_back(argument.type()->str().find("Generator") != std::string::npos);
  }
  return all.emplace(&schema, std::move(k)).first->second;
}

template <typename F>
void each_tensor(const c10::IValue& v, F f) {
  if (v.isTensor()) {
    f(v.toTensor());
  } else if (v.isTensorList()) {
    for (const Tensor& t : v.toTensorVector()) f(t);
  } else if (v.isOptionalTensorList()) {
    for (const std::optional<Tensor>& t : v.toOptionalTensorVector()) {
      if (t) f(*t);
    }
  }
}

// The one device of a call's tensors.
Device checked_device(const Kernel& k, const c10::FunctionSchema& schema, torch::jit::Stack* stack, size_t first) {
  std::optional<Device> device;
  for (size_t i = first; i < stack->size(); ++i) {
    const auto& v = (*stack)[i];
    if (v.isDevice() && v.toDevice().type() == type) {
      device = v.toDevice().has_index() ? v.toDevice() : Device(type, current);
    }
    each_tensor(v, [&](const Tensor& t) {
      if (ours(t)) {
        TORCH_CHECK(
            !device || *device == t.device(), "Expected all tensors to be on the same device, but found at least two "
            "devices, ", *device, " and ", t.device(), "! (", k.name, ")");
        device = t.device();
      } else if (t.defined() && t.device().is_cpu()) {
        TORCH_CHECK(
            !(k.is_indexing && i == first),
            "indices should be either on cpu or on the same device as the indexed tensor (cpu)");
        const bool is_index = k.is_indexing && i == first + 1;
        const bool is_scalar = t.dim() == 0 && (k.is_unchecked || t.unsafeGetTensorImpl()->is_wrapped_number());
        TORCH_CHECK(
            is_index || is_scalar, "Expected all tensors to be on the same device, but got ",
            schema.arguments()[i - first].name(), " is on cpu, different from other tensors (", k.name, ")");
        if (is_index || (is_scalar && k.name == "aten::where.self")) wait("a CPU's tensor in " + k.name);
      }
    });
  }
  return device ? *device : Device(type, current);
}

// What a kernel waits for by its arguments.
void wait_for_arguments(const Kernel& k, const torch::jit::Stack& stack, size_t first) {
  for (int i = 0; i < k.waits; ++i) wait(k.name);
  if (k.name == "aten::multinomial" && (stack[first + 1].toInt() == 1 || !stack[first + 2].toBool())) {
    wait(k.name);
    wait(k.name);
  }
  // Where a mask is read, torch calls nonzero itself. One number is written without row numbers.
  if (k.is_indexing && k.name.find("put") != std::string::npos && stack[first + 2].toTensor().numel() != 1) {
    each_tensor(stack[first + 1], [&](const Tensor& t) {
      if (t.defined() && t.scalar_type() == at::kBool) wait(k.name + " by a mask");
    });
  }
}

void run_on_cpu(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const Kernel& k = kernel_of(op);
  TORCH_CHECK_NOT_IMPLEMENTED(k.exists, "The real device has no kernel of '", k.name, "'.");
  at::AutoDispatchBelowADInplaceOrView below;
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  const Device device = checked_device(k, schema, stack, first);
  c10::OptionalDeviceGuard guard(device);
  wait_for_arguments(k, *stack, first);

  std::vector<Lent> lent;
  std::vector<std::optional<size_t>> lent_as(count);
  auto lend = [&](const Tensor& t) {
    if (!ours(t)) return t;
    lent.push_back({t, on_cpu(t)});
    return lent.back().cpu;
  };
  bool has_generator = false;
  for (size_t i = first; i < stack->size(); ++i) {
    auto& v = (*stack)[i];
    if (v.isTensor() && ours(v.toTensor())) {
      lent_as[i - first] = lent.size();
      v = lend(v.toTensor());
    } else if (v.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(lend(t));
      v = c10::IValue(c10::List<Tensor>(list));
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : v.toOptionalTensorVector()) {
        list.push_back(t ? std::optional<Tensor>(lend(*t)) : std::nullopt);
      }
      v = c10::IValue(list);
    } else if (v.isDevice()) {
      v = Device(c10::DeviceType::CPU);
    } else if (k.takes_generator[i - first]) {
      has_generator = true;
      if (v.isNone()) {
        v = cpu_generator(default_generator(device.index()));
      } else {
        const at::Generator g = v.toGenerator();
        TORCH_CHECK(
            g.device().type() == type, "Expected a '", c10::DeviceTypeName(type, true),
            "' device type for generator but found '", g.device().type(), "'");
        v = cpu_generator(g);
      }
    }
  }
  // Dropout takes no generator: it draws from the CPU's, which becomes the device's for this call.
  const bool swaps = k.is_dropout && !has_generator;
  auto shared = at::detail::getDefaultCPUGenerator();
  auto own = cpu_generator(default_generator(device.index()));
  const auto kept = swaps ? shared.clone() : shared;
  if (swaps) shared.set_state(Tensor(own.get_state()));
  op.redispatchBoxed(DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (swaps) {
    own.set_state(Tensor(shared.get_state()));
    shared.set_state(Tensor(kept.get_state()));
  }
  for (const Lent& l : lent) l.take_back();

  // Each result is an argument that was written to, or new.
  const auto& returns = schema.returns();
  const size_t start = stack->size() - returns.size();
  for (size_t r = 0; r < returns.size(); ++r) {
    auto& v = (*stack)[start + r];
    const auto* written = returns[r].alias_info();
    if (v.isTensor() && written != nullptr) {
      bool is_found = false;
      for (size_t i = 0; i < count && !is_found; ++i) {
        const auto* given = schema.arguments()[i].alias_info();
        is_found = given != nullptr && given->isWrite() && *given == *written && lent_as[i];
        if (is_found) v = lent[*lent_as[i]].mine;
      }
      TORCH_CHECK(is_found, "The emulated device needs a kernel of its own of ", k.name);
    } else if (v.isTensor()) {
      v = on_device(v.toTensor(), device);
    } else if (v.isTensorList() && written == nullptr) {
      std::vector<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(on_device(t, device));
      v = c10::IValue(c10::List<Tensor>(list));
    }
  }
}

// ---- kernels of its own -----------------------------------------------------------------------

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Format = std::optional<at::MemoryFormat>;

Tensor empty(
    c10::IntArrayRef size, Dtype dtype, Layout, std::optional<Device> device, std::optional<bool>, Format format) {
  c10::OptionalDeviceGuard guard(device);
  refuse_float64(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(key), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, Dtype dtype, Layout, std::optional<Device> device,
    std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  refuse_float64(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(key), c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, Format) {
  if (self.sizes() == size) return self;
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  const size_t needed = at::detail::computeStorageNbytesContiguous(size, self.dtype().itemsize(), self.storage_offset());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (needed > storage->nbytes()) {
    c10::OptionalDeviceGuard guard(self.device());
    c10::DataPtr fresh = allocator.allocate(needed);
    if (storage->nbytes() > 0) memcpy(fresh.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(fresh));
    storage->set_nbytes(needed);
  }
  return self;
}

Tensor& set_storage(
    Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  std::vector<int64_t> strides(stride.begin(), stride.end());
  if (stride.empty() && !size.empty()) strides = at::detail::defaultStrides(size);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, strides, offset);
  return self;
}

Tensor& set_empty(Tensor& self) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, allocator.allocate(0), &allocator, true);
  return set_storage(self, none, 0, {0}, {});
}

at::Scalar item(const Tensor& self) {
  wait("item");
  return at::_local_scalar_dense(on_cpu(self));
}

Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (self.is_same(src)) return self;
  if (ours(self) && !ours(src)) {
    if (!non_blocking || !is_pinned(src.storage().data())) wait("copy to the device");
  } else if (ours(src) && !ours(self)) {
    if (self.scalar_type() != src.scalar_type()) refuse_float64(self.scalar_type());  // Metal casts, then copies
    wait(non_blocking ? "asynchronous copy to the CPU" : "copy to the CPU");
  }
  Tensor to = ours(self) ? on_cpu(self) : self;
  to.copy_(ours(src) ? on_cpu(src) : src);
  return self;
}

void record_stream(Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(_, KEY, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, KEY, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_", TORCH_FN(set_empty));
  m.impl("_local_scalar_dense", TORCH_FN(item));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("record_stream", TORCH_FN(record_stream));
  for (const char* whole : {"convolution", "convolution_backward"}) {
    m.impl(whole, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
}

}  // namespace emulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace emulated;
  c10::SetAllocator(type, &allocator);
  take_hooks();
  m.def("configure", [](std::unordered_set<std::string> without, std::unordered_set<std::string> has,
                        std::unordered_map<std::string, int> waits) {
    unchecked = std::move(without);
    existing = std::move(has);
    waiting = std::move(waits);
  });
  m.def("on_wait", [](py::object f) {
    Py_XDECREF(on_wait);
    on_wait = f.is_none() ? nullptr : f.release().ptr();
  });
  m.def("device_count", [] { return num_devices; });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("exchange_device", [](int d) { return d < 0 ? static_cast<int>(current) : std::exchange(current, d); });
  m.def("default_generator", [](int i) { return default_generator(i); });
}
