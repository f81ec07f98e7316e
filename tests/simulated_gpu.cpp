// A CUDA device whose memory is the host's and whose kernels are the CPU's: see simulated_gpu.py.
//
// Every operator that torch knows for a CPU runs on views of the same memory that say "CPU". What a GPU would refuse is
// refused: tensors of both devices in one operator, waits where none may be, and in a capture whatever needs a result.

#include <ATen/CPUFunctions.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::IValue;
using c10::ScalarType;
using c10::TensorImpl;
using Stack = torch::jit::Stack;

namespace {

const Device GPU(c10::DeviceType::CUDA, 0);

// ------------------------------------------------------------------------------------------ what torch asks of a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(GPU); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  Device getDeviceFromPtr(void*) const override { return GPU; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

// ---------------------------------------------------------------------------------------------------------------- memory

// Memory is spoilt when it is taken and when it is given back, so that reading what nobody wrote gives NaN. The pool of
// a graph keeps what it is given back, and hands it out again.
constexpr int SPOILT = 0xFF;
struct Block {
  size_t size;
  int64_t pool;  // 0 outside of graphs
  bool live;
};
std::recursive_mutex mutex;
std::map<void*, Block> blocks;
std::map<std::pair<int64_t, size_t>, std::vector<void*>> idle;
int64_t current_pool = 0;
size_t taken = 0, peak = 0;

void give_back(void* address) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  Block& block = blocks[address];
  block.live = false;
  taken -= block.size;
  if (block.pool == 0 && current_pool == 0) {
    memset(address, SPOILT, block.size);
    blocks.erase(address);
    free(address);
  } else {
    idle[{block.pool, block.size}].push_back(address);
  }
}

void* take(size_t bytes) {
  std::lock_guard<std::recursive_mutex> guard(mutex);
  const size_t size = std::max<size_t>(1, (bytes + 511) / 512) * 512;
  auto& unused = idle[{current_pool, size}];
  void* address = nullptr;
  if (unused.empty()) {
    address = aligned_alloc(512, size);
  } else {
    address = unused.back();
    unused.pop_back();
  }
  blocks[address] = {size, current_pool, true};
  memset(address, SPOILT, size);
  taken += size;
  peak = std::max(peak, taken);
  return address;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, nullptr, GPU};
    void* address = take(bytes);
    return {address, address, &give_back, GPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
Allocator allocator;

Tensor of_storage(c10::Storage storage, ScalarType type) {
  return at::detail::make_tensor<TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::scalarTypeToTypeMeta(type));
}

Tensor gpu_empty(IntArrayRef size, IntArrayRef stride, ScalarType type) {
  const size_t bytes = at::detail::computeStorageNbytes(size, stride, c10::elementSize(type));
  Tensor out = of_storage(
      c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), bytes, allocator.allocate(bytes), &allocator, true),
      type);
  out.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return out;
}

char* start_of(const Tensor& own) {
  return static_cast<char*>(own.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get());
}

// Where a tensor lies: all that a graph remembers of it.
struct Place {
  char* address;
  std::vector<int64_t> size, stride;
  ScalarType type;
  bool is_number;

  explicit Place(const Tensor& own)
      : address(start_of(own)),
        size(own.sizes().vec()),
        stride(own.strides().vec()),
        type(own.scalar_type()),
        is_number(own.unsafeGetTensorImpl()->is_wrapped_number()) {
    static double nothing;
    address = address ? address + own.storage_offset() * own.element_size() : reinterpret_cast<char*>(&nothing);
  }

  Tensor on_cpu() const {
    Tensor out = at::from_blob(address, size, stride, at::TensorOptions().dtype(type).device(at::kCPU));
    if (is_number) out.unsafeGetTensorImpl()->set_wrapped_number(true);
    return out;
  }

  // The same numbers in memory of torch's own, which an operator may resize.
  Tensor copy() const {
    Tensor out = at::empty_strided(size, stride, at::TensorOptions().dtype(type).device(at::kCPU));
    return out.numel() ? out.copy_(on_cpu()) : out;
  }
};

// ------------------------------------------------------------------------------------------------- waits and recordings

struct Graph {
  std::vector<std::function<void()>> kernels;
  int64_t pool = 0;
  std::map<void*, std::vector<char>> before;  // contents of all live memory as the capture began

  void begin(int64_t own_pool);
  void end();
  void replay() const;
};
Graph* recording = nullptr;
bool waits_are_errors = false;

void wait(const std::string& what) {
  TORCH_CHECK(!recording, "CUDA error: operation not permitted when stream is capturing (", what, ")");
  TORCH_CHECK(!waits_are_errors, "called a synchronizing CUDA operation (", what, ")");
}

void Graph::begin(int64_t own_pool) {
  TORCH_CHECK(!recording, "another capture is under way");
  pool = current_pool = own_pool;
  for (const auto& [address, block] : blocks)
    if (block.live) before[address].assign(static_cast<char*>(address), static_cast<char*>(address) + block.size);
  recording = this;
}

// A GPU runs nothing while it is recorded: memory is as it was, and what the recording took is spoilt.
void Graph::end() {
  recording = nullptr;
  current_pool = 0;
  for (const auto& [address, block] : blocks) {
    const auto kept = before.find(address);
    if (kept != before.end())
      memcpy(address, kept->second.data(), block.size);
    else if (block.pool == pool)
      memset(address, SPOILT, block.size);
  }
  before.clear();
}

void Graph::replay() const {
  at::NoGradGuard no_history;
  for (const auto& kernel : kernels) kernel();
}

// --------------------------------------------------------------------------------------------------------- all operators

const std::set<std::string> WAITING = {
    "aten::nonzero",  "aten::nonzero.out",        "aten::masked_select", "aten::masked_select.out", "aten::_unique2",
    "aten::equal",    "aten::unique_consecutive", "aten::unique_dim",    "aten::bincount"};
const std::set<std::string> OF_BOTH_DEVICES = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"};
const std::set<std::string> SOFTMAX = {
    "aten::_softmax", "aten::_softmax.out", "aten::_log_softmax", "aten::_log_softmax.out"};

void run_on_cpu(const c10::OperatorHandle& op, Stack& stack) {
  at::AutoDispatchBelowAutograd no_history;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  op.callBoxed(&stack);
}

void for_tensors(const IValue& value, const std::function<void(const Tensor&)>& see) {
  if (value.isTensor()) {
    see(value.toTensor());
  } else if (value.isList()) {
    for (const IValue& item : value.toListRef())
      if (item.isTensor()) see(item.toTensor());
  }
}

using Change = std::function<Tensor(const Tensor&)>;
IValue with_tensors(const IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& own : value.toTensorVector()) out.push_back(change(own));
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const IValue& item : value.toListRef())
      out.push_back(item.isNone() ? std::nullopt : std::optional<Tensor>(change(item.toTensor())));
    return out;
  }
  return value.isDevice() && value.toDevice() == GPU ? IValue(Device(at::kCPU)) : value;
}

// The arguments of an operator as the CPU gets them, and the way back.
struct Call {
  const c10::OperatorHandle& op;
  std::string name;
  std::vector<IValue> arguments;
  bool widens;                                       // a softmax of half precision into fp32, which no CPU has
  std::unordered_map<TensorImpl*, Tensor> originals;  // of what the CPU gets
  std::vector<std::pair<size_t, Tensor>> outs;        // arguments that may be resized, by number
  std::vector<Place> made;                            // new results

  Call(const c10::OperatorHandle& own, const Stack& stack)
      : op(own), name(c10::toString(own.operator_name())) {
    const size_t count = op.schema().arguments().size();
    arguments.assign(stack.end() - static_cast<int64_t>(count), stack.end());
    widens = SOFTMAX.count(name) && arguments[2].toBool();
  }

  bool is_out(size_t i) const { return op.schema().arguments()[i].is_out() && arguments[i].isTensor(); }

  void refuse_what_a_gpu_would() const {
    bool on_gpu = false, mixed = false;
    for (const IValue& value : arguments)
      for_tensors(value, [&](const Tensor& own) {
        if (own.defined()) (own.is_cuda() ? on_gpu : mixed) |= own.is_cuda() || own.dim() > 0;
      });
    if (!on_gpu) return;
    TORCH_CHECK(!mixed || OF_BOTH_DEVICES.count(name), "tensors of the CPU and of a GPU in ", name);
    const bool counts = name == "aten::repeat_interleave.Tensor" && arguments[1].isNone();
    if (WAITING.count(name) || counts || (mixed && OF_BOTH_DEVICES.count(name))) wait(name);
    if (OF_BOTH_DEVICES.count(name))
      for (const IValue& value : arguments)
        if (value.isOptionalTensorList())
          for_tensors(value, [&](const Tensor& own) {
            if (own.scalar_type() == at::kBool || own.scalar_type() == at::kByte) wait(name + " with a mask");
          });
  }

  Stack for_cpu() {
    Stack out;
    for (size_t i = 0; i < arguments.size(); i++) {
      out.push_back(with_tensors(arguments[i], [&](const Tensor& own) {
        if (!own.defined() || !own.is_cuda()) return own;
        const Place place(own);
        Tensor given = is_out(i) ? place.copy() : place.on_cpu();
        if (is_out(i)) outs.emplace_back(i, given);
        if (widens && i == 0) given = given.to(at::kFloat);
        originals[given.unsafeGetTensorImpl()] = own;
        return given;
      }));
    }
    if (widens) out[2] = false;
    return out;
  }

  Tensor on_gpu(const Tensor& result) {
    if (!result.defined()) return result;
    const auto own = originals.find(result.unsafeGetTensorImpl());
    if (own != originals.end()) return own->second;
    const char* address = static_cast<const char*>(result.const_data_ptr());
    for (const auto& [_, argument] : originals) {
      const char* start = start_of(argument);
      if (result.numel() && start && address >= start && address < start + argument.storage().nbytes()) {
        Tensor view = of_storage(argument.storage(), result.scalar_type());
        view.unsafeGetTensorImpl()->set_storage_offset((address - start) / result.element_size());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides());
        return view;
      }
    }
    Tensor out = gpu_empty(result.sizes(), result.strides(), result.scalar_type());
    made.emplace_back(out);
    made.back().on_cpu().copy_(result);
    return out;
  }

  void write_outs() const {
    for (const auto& [i, given] : outs) {
      const Tensor& own = arguments[i].toTensor();
      if (given.sizes() != own.sizes()) own.resize_(given.sizes());
      if (given.numel()) Place(own).on_cpu().copy_(given);
    }
  }

  // The same again with the same memory, sizes and numbers.
  std::function<void()> recorded() const {
    std::vector<std::function<IValue()>> makers;
    std::map<size_t, Place> out_places;
    for (size_t i = 0; i < arguments.size(); i++) {
      const IValue& value = arguments[i];
      if (is_out(i) && value.toTensor().is_cuda()) {
        const Place place(value.toTensor());
        out_places.emplace(i, place);
        makers.emplace_back([place] { return IValue(place.copy()); });
        continue;
      }
      auto places = std::make_shared<std::vector<std::function<Tensor()>>>();
      for_tensors(value, [&](const Tensor& own) {
        if (own.defined() && own.is_cuda()) {
          const bool wide = widens && i == 0;
          places->push_back([place = Place(own), wide] {
            return wide ? place.on_cpu().to(at::kFloat) : place.on_cpu();
          });
        } else {
          places->push_back([kept = own.defined() ? own.clone() : own] { return kept; });
        }
      });
      // The tensors themselves are not kept, so that their memory can be used again.
      const IValue form = widens && i == 2 ? false : with_tensors(value, [](const Tensor&) { return Tensor(); });
      makers.emplace_back([places, form] {
        size_t next = 0;
        return with_tensors(form, [&](const Tensor&) { return (*places)[next++](); });
      });
    }
    return [op = op, makers, out_places, made = made] {
      Stack stack;
      for (const auto& make : makers) stack.push_back(make());
      const Stack given = stack;
      std::set<TensorImpl*> inputs;
      for (const IValue& value : given)
        for_tensors(value, [&](const Tensor& own) { inputs.insert(own.unsafeGetTensorImpl()); });
      run_on_cpu(op, stack);
      for (const auto& [i, place] : out_places)
        if (given[i].toTensor().numel()) place.on_cpu().copy_(given[i].toTensor());
      size_t next = 0;
      for (const IValue& value : stack)
        for_tensors(value, [&](const Tensor& result) {
          if (next < made.size() && result.defined() && !inputs.count(result.unsafeGetTensorImpl()))
            made[next++].on_cpu().copy_(result);
        });
      TORCH_CHECK(next == made.size(), "a replay wrote ", next, " results of ", made.size());
    };
  }
};

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  Call call(op, *stack);
  call.refuse_what_a_gpu_would();
  Stack inner = call.for_cpu();
  run_on_cpu(op, inner);
  call.write_outs();
  stack->resize(stack->size() - call.arguments.size());
  for (const IValue& value : inner)
    stack->push_back(with_tensors(value, [&](const Tensor& result) { return call.on_gpu(result); }));
  if (recording) recording->kernels.push_back(call.recorded());
}

// ---------------------------------------------------------------------------------- what has no CPU operator behind it

ScalarType type_of(std::optional<ScalarType> given) {
  return given.value_or(c10::typeMetaToScalarType(at::get_default_dtype()));
}

Tensor empty(
    IntArrayRef size, std::optional<ScalarType> type, std::optional<at::Layout>, std::optional<Device>,
    std::optional<bool>, std::optional<at::MemoryFormat>) {
  return gpu_empty(size, c10::contiguous_strides(size), type_of(type));
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> type, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool>) {
  return gpu_empty(size, stride, type_of(type));
}

Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::cpu::as_strided(self, size, stride, offset);
}
Tensor view(const Tensor& self, IntArrayRef size) { return at::cpu::view(self, size); }
Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return at::cpu::unfold(self, dim, size, step);
}
Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return at::cpu::_reshape_alias(self, size, stride);
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* storage = self.storage().unsafeGetStorageImpl();
  const size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  if (bytes > storage->nbytes()) {
    auto fresh = allocator.allocate(bytes);
    if (storage->nbytes()) memcpy(fresh.get(), start_of(self), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(fresh));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* own = self.unsafeGetTensorImpl();
  own->set_storage_keep_dtype(std::move(source));
  own->set_storage_offset(offset);
  own->set_sizes_and_strides(size, stride.empty() ? IntArrayRef(c10::contiguous_strides(size)) : stride);
  return self;
}
Tensor& set_storage_(Tensor& self, at::Storage source) {
  const int64_t count = source.nbytes() / self.element_size();
  return set_(self, std::move(source), 0, {count}, {});
}
Tensor& set_tensor_(Tensor& self, const Tensor& source) {
  return set_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

std::map<const char*, size_t> pinned;  // where, and how many bytes

bool is_pinned(const Tensor& own) {
  const char* address = static_cast<const char*>(own.const_data_ptr());
  const auto next = pinned.upper_bound(address);
  return next != pinned.begin() && address < std::prev(next)->first + std::prev(next)->second;
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.numel() == 0) return self;
  const bool down = !self.is_cuda(), up = !source.is_cuda();
  if ((down && (recording || !(non_blocking && is_pinned(self)))) || (up && !(non_blocking && is_pinned(source))))
    wait(down ? "a copy to the CPU" : "a copy from pageable memory");
  Tensor to = down ? self : Place(self).on_cpu(), from = up ? source : Place(source).on_cpu();
  {
    at::AutoDispatchBelowAutograd no_history;
    to.copy_(from);
  }
  if (recording) {
    // The copies hold the CPU's tensors; a GPU's are addresses.
    recording->kernels.push_back([to, from] { Tensor(to).copy_(from); });
  }
  return self;
}

at::Scalar item(const Tensor& self) {
  wait("item()");
  at::AutoDispatchBelowAutograd no_history;
  return at::_local_scalar_dense(Place(self).on_cpu());
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}
namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, std::string("CUDAHooks"), Hooks);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("as_strided", TORCH_FN(as_strided));
  library.impl("view", TORCH_FN(view));
  library.impl("unfold", TORCH_FN(unfold));
  library.impl("_reshape_alias", TORCH_FN(reshape_alias));
  library.impl("resize_", TORCH_FN(resize_));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_));
  library.impl("set_.source_Storage", TORCH_FN(set_storage_));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor_));
  library.impl("copy_", TORCH_FN(copy_));
  library.impl("_local_scalar_dense", TORCH_FN(item));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  c10::SetAllocator(c10::DeviceType::CUDA, &allocator);
  pybind11::class_<Graph>(module, "Graph")
      .def(pybind11::init<>())
      .def("begin", &Graph::begin)
      .def("end", &Graph::end)
      .def("replay", &Graph::replay);
  module.def("recording", [] { return recording != nullptr; });
  module.def("wait", &wait);
  module.def("waits_are_errors", [](bool errors) { waits_are_errors = errors; });
  module.def("pin", [](const Tensor& own) { pinned[static_cast<const char*>(own.const_data_ptr())] = own.nbytes(); });
  module.def("taken", [] { return taken; });
  module.def("peak", [] { return peak; });
  module.def("reset_peak", [] { peak = taken; });
}
