// Plans by key, and the kernels of the fused ops that look them up. A call without a plan goes to
// Python, which computes it and, at a key's second use, records a plan.

namespace {

// What a plan is good for, as bytes: the op, the call, torch's settings, and the properties of each
// tensor that the recording read.
struct Key {
  std::string bytes;

  void add(const void* data, size_t size) { bytes.append(static_cast<const char*>(data), size); }
  void add(int64_t number) { add(&number, 8); }
  void add(const at::Tensor& tensor) {
    const auto address = reinterpret_cast<uint64_t>(tensor.data_ptr());
    const int8_t head[4] = {static_cast<int8_t>(tensor.scalar_type()),
        static_cast<int8_t>(tensor.dim()), static_cast<int8_t>(address % 16),
        static_cast<int8_t>(address == 0)};
    add(head, 4);
    add(tensor.sizes().data(), 8 * tensor.dim());
    add(tensor.strides().data(), 8 * tensor.dim());
  }
};

int64_t settings() {
  const at::Context& context = at::globalContext();
  int64_t found = context.deterministicAlgorithms();
  found = found << 1 | context.deterministicAlgorithmsWarnOnly();
  found = found << 1 | context.deterministicFillUninitializedMemory();
  found = found << 1 | c10::InferenceMode::is_enabled();
  for (auto option : {context.allowFP16ReductionCuBLAS(), context.allowBF16ReductionCuBLAS()})
    found = found << 4 | static_cast<int64_t>(option);
  const auto precision =
      context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return found << 4 | static_cast<int64_t>(precision);
}

using Shared = std::shared_ptr<const Plan>;

// uses: of a key without a plan. refusal: why it gets none.
struct Entry {
  int uses = 0;
  Shared plan;
  std::string refusal;
};

class Table {
 public:
  // The plan, or whether this use is the one to record.
  std::pair<Shared, bool> look_up(const std::string& key) {
    std::list<Item> dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = places_.find(key);
    if (found == places_.end()) {
      items_.emplace_front(key, Entry{1, nullptr, {}});
      places_.emplace(items_.front().first, items_.begin());
      shrink(dropped);
      return {nullptr, false};
    }
    items_.splice(items_.begin(), items_, found->second);
    Entry& entry = found->second->second;
    if (entry.plan || !entry.refusal.empty()) return {entry.plan, false};
    return {nullptr, ++entry.uses == 2};
  }
  void keep(const std::string& key, Shared plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (Entry* entry = find(key)) entry->plan.swap(plan);
  }
  void refuse(const std::string& key, std::string reason) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (Entry* entry = find(key)) entry->refusal = std::move(reason);
  }
  // After a recording: one that came to nothing is tried again.
  void settle(const std::string& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Entry* entry = find(key);
    if (entry && !entry->plan && entry->refusal.empty()) entry->uses = 1;
  }
  void clear() {
    std::list<Item> dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    places_.clear();
    dropped.swap(items_);
    generation_++;
  }
  void limit(int64_t most) {
    std::list<Item> dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    most_ = most;
    shrink(dropped);
  }
  // Plans, and keys.
  std::vector<int64_t> counts() {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t plans = 0;
    for (const Item& each : items_) plans += each.second.plan != nullptr;
    return {plans, static_cast<int64_t>(items_.size())};
  }
  std::vector<std::string> refusals() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::string> found;
    for (const Item& each : items_)
      if (!each.second.refusal.empty()) found.push_back(each.second.refusal);
    return found;
  }
  int64_t generation() const { return generation_; }

 private:
  using Item = std::pair<std::string, Entry>;

  Entry* find(const std::string& key) {
    const auto found = places_.find(key);
    return found == places_.end() ? nullptr : &found->second->second;
  }
  // What is dropped is destroyed without the lock: freeing a tensor may need Python's.
  void shrink(std::list<Item>& dropped) {
    while (static_cast<int64_t>(items_.size()) > most_) {
      places_.erase(items_.back().first);
      dropped.splice(dropped.begin(), items_, std::prev(items_.end()));
    }
  }

  std::mutex mutex_;
  // The most recently used first.
  std::list<Item> items_;
  std::unordered_map<std::string_view, std::list<Item>::iterator> places_;
  int64_t most_ = 2048;
  std::atomic<int64_t> generation_{0};
};

// Never destroyed: at exit, Python may be gone before.
Table& table() {
  static auto* const found = new Table;
  return *found;
}

std::atomic<bool> enabled{true};

// What Python is recording in this thread.
thread_local const std::string* recorded_key = nullptr;
thread_local Shared candidate;

c10::OperatorHandle twin(const std::string& name, const char* suffix) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(
      ("qlora_plans::" + name + suffix).c_str(), "");
}

// A fused op on a device.
struct Planned final : c10::OperatorKernel {
  explicit Planned(const std::string& name)
      : name_(name), python_(twin(name, "_python")), recorded_(twin(name, "_recorded")) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) const {
    const size_t count = op.schema().arguments().size();
    Inputs inputs;
    Key key;
    if (!enabled || !gather(torch::jit::last(*stack, count), inputs, key)) {
      python_.callBoxed(stack);
      return;
    }
    auto [plan, records] = table().look_up(key.bytes);
    if (plan) {
      auto results = replay(*plan, inputs);
      torch::jit::drop(*stack, count);
      stack->emplace_back(std::move(results));
    } else if (!records) {
      python_.callBoxed(stack);
    } else {
      record(key.bytes, stack);
    }
  }

 private:
  // The tensors in order, and the key; false where they are not all on one device.
  bool gather(c10::ArrayRef<c10::IValue> arguments, Inputs& inputs, Key& key) const {
    key.bytes.reserve(2048);
    key.add(name_.data(), name_.size());
    key.add(table().generation());
    key.add(settings());
    for (const c10::IValue& argument : arguments) {
      if (argument.isTensor()) {
        inputs.push_back(&argument.toTensor());
      } else if (argument.isTensorList()) {
        for (const c10::IValue& each : argument.toListRef()) inputs.push_back(&each.toTensor());
      } else if (argument.isString()) {
        const std::string& text = argument.toStringRef();
        key.add(text.data(), text.size());
      }
      key.add(static_cast<int64_t>(inputs.size()));
    }
    const c10::Device device = inputs[0]->device();
    key.add(device.index());
    for (const at::Tensor* each : inputs) {
      if (each->device() != device || !each->has_storage()) return false;
      key.add(*each);
    }
    return true;
  }

  void record(const std::string& key, Stack* stack) const {
    struct Recording {
      explicit Recording(const std::string& key) : key(key), before(recorded_key) {
        recorded_key = &key;
      }
      ~Recording() {
        recorded_key = before;
        candidate.reset();
        table().settle(key);
      }
      const std::string& key;
      const std::string* before;
    } recording(key);
    recorded_.callBoxed(stack);
  }

  std::string name_;
  c10::OperatorHandle python_, recorded_;
};

// The same op above: to Python where something requires a gradient.
struct Differentiable final : c10::OperatorKernel {
  explicit Differentiable(const std::string& name) : python_(twin(name, "_python")) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) const {
    const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
    if (c10::GradMode::is_enabled() && requires_grad(arguments)) {
      python_.redispatchBoxed(keys, stack);
      return;
    }
    const at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }

 private:
  static bool requires_grad(c10::ArrayRef<c10::IValue> arguments) {
    for (const c10::IValue& argument : arguments) {
      if (argument.isTensor() && argument.toTensor().requires_grad()) return true;
      if (argument.isTensorList())
        for (const c10::IValue& each : argument.toListRef())
          if (each.toTensor().requires_grad()) return true;
    }
    return false;
  }
  c10::OperatorHandle python_;
};

torch::CppFunction boxed(std::unique_ptr<c10::OperatorKernel> kernel) = delete;
template <typename Functor>
torch::CppFunction boxed(std::unique_ptr<Functor> kernel) {
  return torch::CppFunction::makeFromBoxedKernel(
      c10::BoxedKernel::makeFromFunctor(std::move(kernel)));
}

// Has the op `name` looked up on the devices of a dispatch key, "CUDA", and with `differentiable`
// on those of its autograd key, too.
void install(const std::string& name, const std::string& key, bool differentiable) {
  static auto* const libraries = new std::vector<std::unique_ptr<torch::Library>>;
  const auto add = [&](c10::DispatchKey at, torch::CppFunction&& kernel) {
    auto library = std::make_unique<torch::Library>(
        torch::Library::IMPL, "qlora_compile", std::make_optional(at), __FILE__, __LINE__);
    library->impl(name.c_str(), std::move(kernel));
    libraries->push_back(std::move(library));
  };
  add(c10::parseDispatchKey(key), boxed(std::make_unique<Planned>(name)));
  if (differentiable)
    add(c10::parseDispatchKey("Autograd" + key), boxed(std::make_unique<Differentiable>(name)));
}

void make(at::IntArrayRef numbers, std::vector<std::string> names,
    std::vector<at::Tensor> constants, c10::Device device) {
  Reader reader{numbers, names, device};
  candidate = std::make_shared<const Plan>(reader.plan(std::move(constants)));
}
std::vector<at::Tensor> replay_made(at::TensorList tensors) {
  REQUIRE(candidate, "no plan was made in this thread");
  Inputs inputs;
  for (const at::Tensor& each : tensors) inputs.push_back(&each);
  return replay(*candidate, inputs);
}
void keep() {
  REQUIRE(recorded_key && candidate, "no plan was made in this thread");
  table().keep(*recorded_key, candidate);
}
void refuse(std::string reason) {
  REQUIRE(recorded_key, "nothing is recorded in this thread");
  table().refuse(*recorded_key, std::move(reason));
}
// The same memory as another tensor, with storage of its own.
at::Tensor alias(const at::Tensor& tensor) {
  return at::for_blob(tensor.data_ptr(), tensor.sizes())
      .strides(tensor.strides())
      .target_device(tensor.device())
      .options(tensor.options())
      .make_tensor();
}
bool is_capturing(c10::Device device) {
  const Driver& driver = Driver::get();
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  // An error, too, says that something is captured: by a thread that lets no other one launch.
  const CUresult result = driver.is_capturing(driver.current_stream(device), &status);
  return result != CUDA_SUCCESS || status != CU_STREAM_CAPTURE_STATUS_NONE;
}
// What stands for a dtype, a layout or a memory format among a plan's numbers.
int64_t code(std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::MemoryFormat> format) {
  return dtype    ? static_cast<int64_t>(*dtype)
         : layout ? static_cast<int64_t>(*layout)
                  : static_cast<int64_t>(format.value());
}
bool enable(bool on) { return enabled.exchange(on); }

}  // namespace

TORCH_LIBRARY(qlora_plans, m) {
  m.def("install(str name, str key, bool differentiable) -> ()", install);
  m.def("make(int[] numbers, str[] names, Tensor[] constants, Device device) -> ()", make);
  m.def("replay(Tensor[] inputs) -> Tensor[]", replay_made);
  m.def("keep() -> ()", keep);
  m.def("refuse(str reason) -> ()", refuse);
  m.def("alias(Tensor tensor) -> Tensor", alias);
  m.def("is_capturing(Device device) -> bool", is_capturing);
  m.def("code(ScalarType? dtype, Layout? layout, MemoryFormat? format) -> int", code);
  m.def("enable(bool on) -> bool", enable);
  m.def("clear() -> ()", [] { table().clear(); });
  m.def("limit(int most) -> ()", [](int64_t most) { table().limit(most); });
  m.def("counts() -> int[]", [] { return table().counts(); });
  m.def("refusals() -> str[]", [] { return table().refusals(); });
}
