#include "work.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "driver.hpp"

namespace sana::plugins {
namespace {

constexpr unsigned kWarp = 32;  // threads
constexpr std::array<std::int64_t, 3> kMaxGrid = {2147483647, 65535, 65535};
constexpr std::int64_t kPlainShared = 48 * 1024;              // bytes of dynamic shared memory that a kernel may have without asking
constexpr int kMajor = 75, kMinor = 76, kMaxDynamicShared = 8;  // CU_DEVICE_ATTRIBUTE_…, CU_FUNC_ATTRIBUTE_…

void check_aligned(const std::string& op, const Addresses& inputs, const Addresses& outputs) {
    std::uint64_t seen = 0;
    for (const std::uint64_t each : inputs) seen |= each;
    for (const std::uint64_t each : outputs) seen |= each;
    if (seen % kAlignment != 0) {
        throw LaunchError(op + ": got tensors at addresses that are not multiples of " + std::to_string(kAlignment) +
                          " bytes; expected all to be");
    }
}

// The kernel's function for the current CUDA context's device; loaded once a context, never unloaded.
void* load(const Launch& launch, std::string_view cubins, const Kernel*& kernel) {
    static std::mutex lock;
    static std::map<std::pair<unsigned long long, std::string>, void*> functions;
    const unsigned long long context = current_context_id(launch.op);
    int device = 0, major = 0, minor = 0;
    driver_ok(driver().cuCtxGetDevice(&device), "cuCtxGetDevice");
    driver_ok(driver().cuDeviceGetAttribute(&major, kMajor, device), "cuDeviceGetAttribute");
    driver_ok(driver().cuDeviceGetAttribute(&minor, kMinor, device), "cuDeviceGetAttribute");
    const std::string sm = "sm" + std::to_string(major) + std::to_string(minor);
    const std::string_view cubin = launch.cubin(cubins, sm);
    kernel = &launch.kernels.at(sm);
    const std::lock_guard held(lock);
    void*& function = functions[{context, kernel->sha256}];
    if (function == nullptr) {
        void *module = nullptr, *found = nullptr;
        driver_ok(driver().cuModuleLoadData(&module, cubin.data()), launch.op + ": cuModuleLoadData of the " + sm + " cubin");
        driver_ok(driver().cuModuleGetFunction(&found, module, kernel->entry.c_str()),
                  launch.op + ": cuModuleGetFunction(" + kernel->entry + ")");
        if (kernel->shared > kPlainShared) {
            driver_ok(driver().cuFuncSetAttribute(found, kMaxDynamicShared, static_cast<int>(kernel->shared)),
                      launch.op + ": " + std::to_string(kernel->shared) + " bytes of shared memory");
        }
        function = found;
    }
    return function;
}

class KernelWork : public Work {
  public:
    KernelWork(const Launch& launch, std::string_view cubins)
        : launch_(launch), arguments_(launch), function_(load(launch, cubins, kernel_)) {}

    void prepare(const Dims& dims) override {
        std::array<std::int64_t, 3> grid{};
        for (std::size_t i = 0; i < grid.size(); ++i) {
            grid[i] = launch_.grid[i].evaluate(dims);
            if (grid[i] < 0 || grid[i] > kMaxGrid[i]) {
                throw LaunchError(launch_.op + ": got shapes " + shapes_text(dims) + ", a grid of " + std::to_string(grid[i]) +
                                  " blocks on axis " + std::to_string(i) + "; expected at most " + std::to_string(kMaxGrid[i]));
            }
        }
        arguments_.set_shapes(dims);
        grid_ = grid;
    }

    void queue(const Addresses& inputs, const Addresses& outputs, std::uint64_t, void* stream) override {
        if (std::find(grid_.begin(), grid_.end(), 0) != grid_.end()) return;  // an empty tensor; CUDA refuses an empty grid
        arguments_.set_addresses(inputs, outputs);
        const unsigned threads = kWarp * static_cast<unsigned>(kernel_->warps);
        const int code = driver().cuLaunchKernel(function_, static_cast<unsigned>(grid_[0]), static_cast<unsigned>(grid_[1]),
                                                 static_cast<unsigned>(grid_[2]), threads, 1, 1,
                                                 static_cast<unsigned>(kernel_->shared), stream, arguments_.at(), nullptr);
        if (code != 0) {
            driver_ok(code, launch_.op + ": cuLaunchKernel, grid (" + std::to_string(grid_[0]) + ", " + std::to_string(grid_[1]) +
                                ", " + std::to_string(grid_[2]) + "), " + std::to_string(threads) + " threads, " +
                                std::to_string(kernel_->shared) + " bytes shared");
        }
    }

  private:
    const Launch& launch_;
    Arguments arguments_;
    const Kernel* kernel_ = nullptr;
    void* function_;
    std::array<std::int64_t, 3> grid_{};
};

class ProductWork : public Work {
  public:
    explicit ProductWork(const Launch& launch)
        : launch_(launch), scaled_(launch.inputs[0] == "int8"), biased_(launch.inputs.size() == (scaled_ ? 5U : 3U)),
          product_(scaled_ ? "fp8" : launch.inputs[0], biased_, current_context_id(launch.op)) {}

    void prepare(const Dims& dims) override {
        const Product& sizes = *launch_.product;
        const std::int64_t rows = sizes.rows.evaluate(dims), columns = sizes.columns.evaluate(dims),
                           depth = sizes.depth.evaluate(dims);
        std::vector<std::int64_t> x = dims.empty() ? std::vector<std::int64_t>{} : dims[0];
        if (!x.empty()) x.pop_back();
        Dims expected = {x, {columns, depth}};
        expected[0].push_back(depth);
        if (scaled_) expected.insert(expected.end(), {x, {columns}});
        if (biased_) expected.push_back({columns});
        if (dims != expected)
            throw LaunchError(launch_.op + ": got shapes " + shapes_text(dims) + "; expected " + shapes_text(expected));
        empty_ = rows == 0 || columns == 0 || depth == 0;
        if (!empty_) product_.prepare(rows, columns, depth);
    }

    void queue(const Addresses& inputs, const Addresses& outputs, std::uint64_t workspace, void* stream) override {
        check_aligned(launch_.op, inputs, outputs);
        if (empty_) return;
        product_.run({inputs[0], inputs[1], biased_ ? inputs.back() : 0, outputs[0], scaled_ ? inputs[2] : 0,
                      scaled_ ? inputs[3] : 0, workspace},
                     stream);
    }

  private:
    const Launch& launch_;
    bool scaled_, biased_, empty_ = true;
    LtProduct product_;
};

}  // namespace

Arguments::Arguments(const Launch& launch) : launch_(launch), values_(launch.args.size()) {
    for (std::size_t slot = 0; slot < values_.size(); ++slot) {
        addresses_.push_back(&values_[slot]);  // a scalar lies in the first, little-endian, bytes of its slot
        if (launch.args[slot].kind == Argument::Kind::kF32) values_[slot] = std::bit_cast<std::uint32_t>(launch.args[slot].number);
    }
}

void Arguments::set_shapes(const Dims& dims) {
    for (std::size_t slot = 0; slot < values_.size(); ++slot) {
        if (launch_.args[slot].kind != Argument::Kind::kI32) continue;
        const std::int64_t value = launch_.args[slot].expression.evaluate(dims);
        if (value < std::numeric_limits<std::int32_t>::min() || value > std::numeric_limits<std::int32_t>::max()) {
            throw LaunchError(launch_.op + ": got shapes " + shapes_text(dims) + ", where argument " + std::to_string(slot) + " is " +
                              std::to_string(value) + "; expected a number of 32 bits");
        }
        values_[slot] = static_cast<std::uint32_t>(value);
    }
}

void Arguments::set_addresses(const Addresses& inputs, const Addresses& outputs) {
    Addresses used_inputs, used_outputs;
    for (std::size_t slot = 0; slot < values_.size(); ++slot) {
        const Argument& arg = launch_.args[slot];
        if (arg.kind == Argument::Kind::kIn) values_[slot] = inputs.at(arg.index), used_inputs.push_back(values_[slot]);
        if (arg.kind == Argument::Kind::kOut) values_[slot] = outputs.at(arg.index), used_outputs.push_back(values_[slot]);
    }
    check_aligned(launch_.op, used_inputs, used_outputs);
}

std::unique_ptr<Work> make_work(const Launch& launch, std::string_view cubins) {
    if (launch.product) return std::make_unique<ProductWork>(launch);
    return std::make_unique<KernelWork>(launch, cubins);
}

}  // namespace sana::plugins
