// A plan and its replay: allocates the results and one slab, then starts kernels and torch operators
// in the order in which they were recorded. Nothing here holds Python's lock.
//
// Python writes a plan as numbers, read by `read_plan`; plans/encoding.py has the same order.
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/SmallVector.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <cstring>
#include <variant>

#include "cuda.h"

// TORCH_CHECK would begin the message with a function and a file.
#define REQUIRE(condition, ...) \
  if (!(condition)) C10_THROW_ERROR(Error, c10::str(__VA_ARGS__))

namespace {

using torch::jit::Stack;
using Inputs = c10::SmallVector<const at::Tensor*, 64>;

// The driver's functions. libcuda is looked up at run time, as nothing is linked with CUDA.
struct Driver {
  decltype(&cuLaunchKernelEx) launch;
  decltype(&cuTensorMapEncodeTiled) encode;
  decltype(&cuStreamIsCapturing) is_capturing;
  decltype(&cuGetErrorString) error;
  decltype(&cuCtxGetCurrent) context;
  decltype(&cuCtxSetCurrent) set_context;
  decltype(&cuDevicePrimaryCtxRetain) primary_context;
  // Since CUDA 12.4; null before.
  CUresult (*parameter)(CUfunction, size_t, size_t*, size_t*);
  // Of torch, where it is built with CUDA.
  int32_t (*stream)(int32_t, void**);
  int version = 0;

  Driver() {
    void* cuda = dlopen("libcuda.so.1", RTLD_LAZY);
    REQUIRE(cuda, "libcuda.so.1 cannot be loaded: ", dlerror());
    find(cuda, launch, "cuLaunchKernelEx");
    find(cuda, encode, "cuTensorMapEncodeTiled");
    find(cuda, is_capturing, "cuStreamIsCapturing");
    find(cuda, error, "cuGetErrorString");
    find(cuda, context, "cuCtxGetCurrent");
    find(cuda, set_context, "cuCtxSetCurrent");
    find(cuda, primary_context, "cuDevicePrimaryCtxRetain");
    reinterpret_cast<void*&>(parameter) = dlsym(cuda, "cuFuncGetParamInfo");
    decltype(&cuDriverGetVersion) ask;
    find(cuda, ask, "cuDriverGetVersion");
    REQUIRE(ask(&version) == CUDA_SUCCESS, "cuDriverGetVersion failed");
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    stream = nullptr;
    if (torch_cuda) find(torch_cuda, stream, "aoti_torch_get_current_cuda_stream");
  }

  template <typename Function>
  static void find(void* library, Function& function, const char* name) {
    reinterpret_cast<void*&>(function) = dlsym(library, name);
    REQUIRE(function, "there is no ", name);
  }

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  CUstream current_stream(c10::Device device) const {
    void* found = nullptr;
    if (device.is_cuda()) REQUIRE(stream(device.index(), &found) == 0, "no current stream");
    return static_cast<CUstream>(found);
  }

  // A thread that has not called CUDA's runtime yet has none.
  void ensure_context(c10::Device device) const {
    CUcontext found = nullptr;
    if (context(&found) != CUDA_SUCCESS || found) return;
    if (primary_context(&found, device.has_index() ? device.index() : 0) == CUDA_SUCCESS)
      set_context(found);
  }
};

// Bytes behind the start of a source: an input, a constant, the slab, a result or an operator's
// own result, counted in this order.
struct Place {
  int64_t source, offset;
};
struct Pointer {
  size_t parameter;
  Place place;
};
struct Map {
  size_t parameter;
  Place place;
  CUtensorMapDataType type;
  uint32_t rank;
  uint64_t shape[5], strides[5];
  uint32_t box[5];
  CUtensorMapSwizzle swizzle;
  CUtensorMapFloatOOBfill fill;
  bool small;
};
struct Kernel {
  std::string name;
  CUfunction function;
  unsigned grid[3], threads, shared;
  std::vector<uint64_t> parameters;
  std::vector<Pointer> pointers;
  std::vector<Map> maps;
};
struct View {
  Place place;
  at::ScalarType dtype;
  std::vector<int64_t> shape, strides;
};
using Argument = std::variant<c10::IValue, View, std::vector<View>>;
struct Operator {
  c10::OperatorHandle handle;
  std::vector<Argument> arguments;
  // The source that each of its results becomes; -1 for a tensor that it wrote to.
  std::vector<int64_t> results;
};
struct Step {
  std::variant<Kernel, Operator> what;
  // Of operators' results, by source: not needed any more.
  std::vector<int64_t> released;
};
struct Result {
  int64_t source;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
};
struct Plan {
  std::string call;
  int64_t inputs, slab, sources;
  std::vector<at::Tensor> constants;
  std::vector<Result> results;
  std::vector<Step> steps;
};

[[noreturn]] void fail(CUresult error, const std::string& kernel, const std::string& call) {
  const char* text = nullptr;
  Driver::get().error(error, &text);
  auto message = c10::str("CUDA error ", static_cast<int>(error), " (", text ? text : "unknown",
      ") when starting the kernel ", kernel, " of ", call);
  if (error == CUDA_ERROR_OUT_OF_MEMORY) C10_THROW_ERROR(OutOfMemoryError, message);
  C10_THROW_ERROR(Error, message);
}

at::Tensor viewed(const View& view, const uint64_t* starts, c10::Device device) {
  auto* at = reinterpret_cast<void*>(starts[view.place.source] + view.place.offset);
  return at::for_blob(at, view.shape)
      .strides(view.strides)
      .target_device(device)
      .options(at::TensorOptions().dtype(view.dtype).device(device))
      .make_tensor();
}

void start(const Kernel& kernel, const Plan& plan, const uint64_t* starts, CUstream stream) {
  const Driver& driver = Driver::get();
  const size_t count = kernel.parameters.size();
  // Parameters take 4 KB at most: fewer than 512 of them, and fewer than 32 maps.
  uint64_t numbers[512];
  void* parameters[512];
  alignas(64) CUtensorMap maps[32];
  memcpy(numbers, kernel.parameters.data(), 8 * count);
  for (size_t i = 0; i < count; i++) parameters[i] = &numbers[i];
  for (const Pointer& each : kernel.pointers)
    numbers[each.parameter] = starts[each.place.source] + each.place.offset;
  CUtensorMap* map = maps;
  for (const Map& each : kernel.maps) {
    const uint32_t ones[5] = {1, 1, 1, 1, 1};
    auto* at = reinterpret_cast<void*>(starts[each.place.source] + each.place.offset);
    const CUresult result = driver.encode(map, each.type, each.rank, at, each.shape, each.strides,
        each.box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, each.swizzle,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, each.fill);
    if (result != CUDA_SUCCESS) fail(result, kernel.name + " (its tensor map)", plan.call);
    // As Triton and CUTLASS do: drivers up to CUDA 13.1 set a bit that small tensors must not have.
    if (each.small) reinterpret_cast<uint64_t*>(map)[1] &= ~(1ull << 21);
    parameters[each.parameter] = map++;
  }
  CUlaunchConfig config{};
  config.gridDimX = kernel.grid[0], config.gridDimY = kernel.grid[1];
  config.gridDimZ = kernel.grid[2];
  config.blockDimX = kernel.threads, config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = kernel.shared;
  config.hStream = stream;
  const CUresult result = driver.launch(&config, kernel.function, parameters, nullptr);
  if (result != CUDA_SUCCESS) fail(result, kernel.name, plan.call);
}

std::vector<at::Tensor> replay(const Plan& plan, const Inputs& inputs) {
  REQUIRE(static_cast<int64_t>(inputs.size()) == plan.inputs, "a plan for ", plan.inputs,
      " tensors was given ", inputs.size());
  const c10::Device device = inputs[0]->device();
  const c10::DeviceGuard guard(device);
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
  const auto options = at::TensorOptions().device(device);
  c10::SmallVector<uint64_t, 96> starts;
  const auto add = [&](const at::Tensor& t) {
    starts.push_back(reinterpret_cast<uint64_t>(t.data_ptr()));
  };
  for (const at::Tensor* each : inputs) add(*each);
  for (const at::Tensor& each : plan.constants) add(each);
  at::Tensor slab;
  if (plan.slab) slab = at::empty({plan.slab}, options.dtype(at::kByte));
  starts.push_back(plan.slab ? reinterpret_cast<uint64_t>(slab.data_ptr()) : 0);
  std::vector<at::Tensor> results(plan.results.size());
  for (size_t i = 0; i < results.size(); i++) {
    const Result& each = plan.results[i];
    if (each.source >= 0) continue;
    results[i] = at::empty(each.shape, options.dtype(each.dtype));
    add(results[i]);
  }
  const int64_t own = starts.size();
  starts.resize(plan.sources, 0);
  std::vector<at::Tensor> values(plan.sources - own);
  const Driver& driver = Driver::get();
  driver.ensure_context(device);
  const CUstream stream = driver.current_stream(device);
  for (const Step& step : plan.steps) {
    if (const auto* kernel = std::get_if<Kernel>(&step.what)) {
      start(*kernel, plan, starts.data(), stream);
    } else {
      const auto& op = std::get<Operator>(step.what);
      Stack stack;
      stack.reserve(op.arguments.size());
      for (const Argument& argument : op.arguments) {
        if (const auto* constant = std::get_if<c10::IValue>(&argument)) {
          stack.push_back(*constant);
        } else if (const auto* view = std::get_if<View>(&argument)) {
          stack.emplace_back(viewed(*view, starts.data(), device));
        } else {
          std::vector<at::Tensor> list;
          for (const View& view : std::get<std::vector<View>>(argument))
            list.push_back(viewed(view, starts.data(), device));
          stack.emplace_back(std::move(list));
        }
      }
      op.handle.callBoxed(&stack);
      for (size_t i = 0; i < op.results.size(); i++) {
        if (op.results[i] < 0) continue;
        at::Tensor& value = values[op.results[i] - own] = stack[i].toTensor();
        starts[op.results[i]] = reinterpret_cast<uint64_t>(value.data_ptr());
      }
    }
    for (int64_t source : step.released) values[source - own].reset();
  }
  for (size_t i = 0; i < results.size(); i++) {
    const Result& each = plan.results[i];
    if (each.source < 0) continue;
    const at::Tensor& value = values[each.source - own];
    results[i] = value.sizes() == each.shape ? value : value.view(each.shape);
  }
  return results;
}

// Reads what plans/encoding.py writes.
struct Reader {
  at::IntArrayRef numbers;
  c10::ArrayRef<std::string> names;
  c10::Device device;

  int64_t next() {
    REQUIRE(!numbers.empty(), "a plan that was cut off");
    const int64_t found = numbers.front();
    numbers = numbers.slice(1);
    return found;
  }
  std::string name() {
    REQUIRE(!names.empty(), "a plan that was cut off");
    const std::string found = names.front();
    names = names.slice(1);
    return found;
  }
  std::vector<int64_t> list() {
    std::vector<int64_t> found(next());
    for (int64_t& each : found) each = next();
    return found;
  }
  at::ScalarType dtype() { return static_cast<at::ScalarType>(next()); }
  Place place() {
    const int64_t source = next();
    return {source, next()};
  }
  View view() {
    View found{place(), dtype(), list(), {}};
    found.strides = list();
    return found;
  }
  double real() {
    const int64_t bits = next();
    double value;
    memcpy(&value, &bits, 8);
    return value;
  }

  // A Python number where a tensor is expected, as torch itself wraps one.
  c10::IValue wrapped(at::Tensor number) {
    number.unsafeGetTensorImpl()->set_wrapped_number(true);
    return c10::IValue(number);
  }

  enum { NONE, INT, FLOAT, BOOL, INTS, DEVICE, VIEW, VIEWS, NUMBER, WHOLE };
  Argument argument() {
    switch (next()) {
      case NONE: return c10::IValue();
      case INT: return c10::IValue(next());
      case FLOAT: return c10::IValue(real());
      case BOOL: return c10::IValue(next() != 0);
      case INTS: return c10::IValue(list());
      case DEVICE: return c10::IValue(device);
      case VIEW: return view();
      case VIEWS: {
        std::vector<View> found;
        for (int64_t count = next(); count > 0; count--) found.push_back(view());
        return found;
      }
      case NUMBER: return wrapped(at::scalar_tensor(real(), at::kDouble));
      case WHOLE: return wrapped(at::scalar_tensor(next(), at::kLong));
    }
    C10_THROW_ERROR(Error, "an unknown kind of argument");
  }

  Kernel kernel() {
    enum { CONSTANT, POINTER, MAP };
    Kernel found;
    found.name = name();
    found.function = reinterpret_cast<CUfunction>(next());
    for (unsigned& each : found.grid) each = next();
    found.threads = next();
    found.shared = next();
    const size_t count = next();
    REQUIRE(count <= 512, found.name, " has ", count, " parameters");
    for (size_t i = 0; i < count; i++) {
      const int64_t kind = next(), size = next();
      check_size(found, i, size);
      found.parameters.push_back(kind == CONSTANT ? next() : 0);
      if (kind == POINTER) found.pointers.push_back({i, place()});
      if (kind == MAP) found.maps.push_back(map(i));
    }
    check_size(found, count, -1);
    REQUIRE(found.maps.size() <= 32, found.name, " has ", found.maps.size(), " tensor maps");
    return found;
  }
  // Compares with what the binary declares. size: -1 behind the last parameter.
  static void check_size(const Kernel& kernel, size_t index, int64_t size) {
    const auto ask = Driver::get().parameter;
    if (!ask) return;
    size_t offset = 0, declared = 0;
    const bool there = ask(kernel.function, index, &offset, &declared) == CUDA_SUCCESS;
    REQUIRE(there ? static_cast<int64_t>(declared) == size : size < 0, "parameter ", index,
        " of ", kernel.name, " has other bytes than Triton's launchers are known to pass");
  }
  Map map(size_t parameter) {
    Map found{};
    found.parameter = parameter;
    found.place = place();
    found.type = static_cast<CUtensorMapDataType>(next());
    found.swizzle = static_cast<CUtensorMapSwizzle>(next());
    found.fill = static_cast<CUtensorMapFloatOOBfill>(next());
    const int64_t element = next();
    found.rank = next();
    REQUIRE(0 < found.rank && found.rank <= 5, "a tensor map of rank ", found.rank);
    int64_t last = 0;
    // The driver's order begins with the innermost dimension.
    for (int i = found.rank - 1; i >= 0; i--) {
      found.shape[i] = next();
      const int64_t stride = next() * element;
      if (i > 0) found.strides[i - 1] = stride;
      last += (found.shape[i] - 1) * stride;
      found.box[i] = next();
    }
    found.small = Driver::get().version <= 13010 && last + 1 < 128 * 1024;
    return found;
  }
  Operator operation() {
    const std::string found = name(), overload = name();
    auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(found.c_str(), overload.c_str());
    Operator made{handle, {}, {}};
    for (int64_t count = next(); count > 0; count--) made.arguments.push_back(argument());
    made.results = list();
    return made;
  }
  Plan plan(std::vector<at::Tensor> constants) {
    Plan found;
    found.call = name();
    found.inputs = next(), found.slab = next(), found.sources = next();
    found.constants = std::move(constants);
    for (int64_t count = next(); count > 0; count--) {
      const int64_t source = next();
      const at::ScalarType type = dtype();
      found.results.push_back({source, type, list()});
    }
    for (int64_t count = next(); count > 0; count--) {
      Step step{next() == 0 ? decltype(Step::what)(kernel()) : operation(), {}};
      step.released = list();
      found.steps.push_back(std::move(step));
    }
    return found;
  }
};

}  // namespace
