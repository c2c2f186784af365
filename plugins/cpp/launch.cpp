#include "launch.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "digest.hpp"
#include "failure.hpp"
#include "json.hpp"
#include "python_text.hpp"

namespace sana::plugins {
namespace {

constexpr std::int64_t kFormat = 2;
constexpr std::size_t kMaxDepth = 8;
constexpr std::int64_t kMaxAxes = 8;
constexpr std::array<const char*, 9> kTypes = {"fp32", "fp16", "bf16", "fp8", "int32", "int64", "int8", "uint8", "bool"};
constexpr std::array<const char*, 7> kOperations = {"add", "sub", "mul", "floordiv", "ceildiv", "min", "max"};
constexpr const char* kOperationNames = "add|sub|mul|floordiv|ceildiv|min|max";

[[noreturn]] void unreadable(const std::string& why) {
    throw LaunchError("got a launch description that cannot be read (" + why + "); expected JSON of format " +
                      std::to_string(kFormat));
}

const Json& field(const Json& value, const char* name) {
    const Json* found = value.find(name);
    if (found == nullptr) unreadable(std::string("no field ") + repr(name));
    return *found;
}

// Python's dataclasses refuse a field that they do not have.
void only(const Json& value, std::initializer_list<const char*> names) {
    const JsonObject* object = value.get<JsonObject>();
    if (object == nullptr) unreadable(python_repr(value) + " where an object was expected");
    for (const auto& [key, unused] : *object) {
        if (std::find(names.begin(), names.end(), key) == names.end()) unreadable("unknown field " + repr(key));
    }
    for (const char* name : names) field(value, name);
}

template <class T>
const T& as(const Json& value) {
    const T* found = value.get<T>();
    if (found == nullptr) unreadable("got " + python_repr(value) + " of another type than was expected");
    return *found;
}

std::optional<std::size_t> index_below(const Json& value, std::int64_t limit) {
    const std::int64_t* found = value.get<std::int64_t>();
    if (found == nullptr || *found < 0 || *found >= limit) return std::nullopt;
    return static_cast<std::size_t>(*found);
}

std::optional<Expression> read_expression(const Json& value, std::size_t num_inputs, std::size_t depth) {
    if (const auto* number = value.get<std::int64_t>()) return Expression{Operation::kConstant, *number, 0, 0, {}};
    const JsonArray* parts = value.get<JsonArray>();
    if (parts == nullptr || parts->size() != 3) return std::nullopt;
    const std::string* name = (*parts)[0].get<std::string>();
    if (name == nullptr) return std::nullopt;
    if (*name == "dim") {
        const auto input = index_below((*parts)[1], static_cast<std::int64_t>(num_inputs));
        const auto axis = index_below((*parts)[2], kMaxAxes);
        if (!input || !axis) return std::nullopt;
        return Expression{Operation::kDim, 0, *input, *axis, {}};
    }
    const auto found = std::find(kOperations.begin(), kOperations.end(), *name);
    if (found == kOperations.end() || depth >= kMaxDepth) return std::nullopt;
    auto left = read_expression((*parts)[1], num_inputs, depth + 1);
    auto right = read_expression((*parts)[2], num_inputs, depth + 1);
    if (!left || !right) return std::nullopt;
    const auto operation = static_cast<Operation>(static_cast<int>(Operation::kAdd) + (found - kOperations.begin()));
    return Expression{operation, 0, 0, 0, {std::move(*left), std::move(*right)}};
}

Expression expression(const Json& value, const Launch& launch) {
    auto found = read_expression(value, launch.inputs.size(), 0);
    if (!found) {
        throw LaunchError(launch.op + ": got expression " + python_repr(value) +
                          "; expected an integer, [\"dim\", input, axis] of " + std::to_string(launch.inputs.size()) +
                          " inputs, or [" + kOperationNames + ", a, b], at most " + std::to_string(kMaxDepth) + " deep");
    }
    return std::move(*found);
}

Argument argument(const Json& value, const Launch& launch) {
    const JsonArray* parts = value.get<JsonArray>();
    const std::string* kind = parts != nullptr && !parts->empty() ? (*parts)[0].get<std::string>() : nullptr;
    if (kind != nullptr) {
        if (*kind == "null" && parts->size() == 1) return {};
        if (parts->size() == 2) {
            const Json& second = (*parts)[1];
            if (*kind == "i32") return {Argument::Kind::kI32, 0, expression(second, launch), 0};
            const auto input = index_below(second, static_cast<std::int64_t>(launch.inputs.size()));
            if (*kind == "in" && input) return {Argument::Kind::kIn, *input, {}, 0};
            const auto output = index_below(second, static_cast<std::int64_t>(launch.outputs.size()));
            if (*kind == "out" && output) return {Argument::Kind::kOut, *output, {}, 0};
            const auto *real = second.get<double>();
            const auto *whole = second.get<std::int64_t>();
            if (*kind == "f32" && (real || whole))
                return {Argument::Kind::kF32, 0, {}, static_cast<float>(real ? *real : static_cast<double>(*whole))};
        }
    }
    throw LaunchError(launch.op + ": got kernel argument " + python_repr(value) +
                      "; expected [\"in\"|\"out\", index], [\"i32\", …], [\"f32\", …] or [\"null\"]");
}

Kernel kernel(const Json& value, const std::string& op, const std::string& sm) {
    only(value, {"entry", "warps", "shared", "offset", "size", "sha256"});
    Kernel out{as<std::string>(field(value, "entry")), 0, 0, 0, 0, as<std::string>(field(value, "sha256"))};
    bool whole = true;
    const auto count = [&](const char* name) {
        const auto found = index_below(field(value, name), std::int64_t{1} << 31);
        whole = whole && found;
        return static_cast<std::int64_t>(found.value_or(0));
    };
    out.warps = count("warps"), out.shared = count("shared"), out.offset = count("offset"), out.size = count("size");
    if (!whole || out.size == 0 || out.warps < 1 || out.warps > 32 || out.entry.empty()) {
        throw LaunchError(op + ", " + sm + ": got " + python_repr(value) +
                          "; expected whole numbers, 1 to 32 warps, a cubin and an entry");
    }
    return out;
}

// As PRODUCTS of plugins/launch.py: types of the inputs, without a bias, to that of the output.
std::string product_type(const std::vector<std::string>& inputs) {
    if (inputs.size() == 2 && inputs[0] == inputs[1] && (inputs[0] == "fp32" || inputs[0] == "fp16" || inputs[0] == "bf16"))
        return inputs[0];
    return inputs == std::vector<std::string>{"int8", "int8", "fp32", "fp32"} ? "fp16" : "";
}

void check_product(const Launch& launch) {
    std::vector<std::string> unbiased = launch.inputs;
    if (!unbiased.empty()) unbiased.pop_back();
    const bool biased = !launch.inputs.empty() && product_type(unbiased) == launch.inputs.back();
    const std::string expected = product_type(biased ? unbiased : launch.inputs);
    if (!launch.kernels.empty() || launch.outputs.size() != 1 || expected.empty() || launch.outputs[0].type != expected) {
        throw LaunchError(launch.op + ": got a product of types that cuBLASLt is not asked for, or with " +
                          std::to_string(launch.kernels.size()) + " kernels; expected none, and two inputs of fp32, fp16 or bf16, "
                          "or two of int8 with two of fp32, with or without a bias");
    }
}

Launch read(std::string_view data) {
    const Json json = parse_json(data, "launch");
    const Json& format = field(json, "format");
    if (const auto* found = format.get<std::int64_t>(); found == nullptr || *found != kFormat) {
        throw LaunchError("got launch format " + python_repr(format) + "; expected " + std::to_string(kFormat) +
                          ". Build the engine again with this version");
    }
    only(json, {"format", "op", "inputs", "outputs", "grid", "args", "kernels", "product"});
    Launch out;
    out.op = as<std::string>(field(json, "op"));
    for (const Json& type : as<JsonArray>(field(json, "inputs"))) out.inputs.push_back(as<std::string>(type));
    std::vector<std::string> types = out.inputs;
    for (const Json& output : as<JsonArray>(field(json, "outputs"))) {
        only(output, {"type", "shape"});
        types.push_back(as<std::string>(field(output, "type")));
        out.outputs.push_back({types.back(), {}});
        for (const Json& size : as<JsonArray>(field(output, "shape"))) out.outputs.back().shape.push_back(expression(size, out));
    }
    for (const std::string& type : types) {
        if (std::find(kTypes.begin(), kTypes.end(), type) == kTypes.end()) {
            throw LaunchError(out.op + ": got tensor type " + repr(type) +
                              "; expected one of fp32, fp16, bf16, fp8, int32, int64, int8, uint8, bool");
        }
    }
    for (const Json& size : as<JsonArray>(field(json, "grid"))) out.grid.push_back(expression(size, out));
    if (out.grid.size() != 3)
        throw LaunchError(out.op + ": got a grid of " + std::to_string(out.grid.size()) + " numbers; expected 3");
    for (const Json& arg : as<JsonArray>(field(json, "args"))) out.args.push_back(argument(arg, out));
    for (const auto& [sm, value] : as<JsonObject>(field(json, "kernels"))) out.kernels[sm] = kernel(value, out.op, sm);
    if (const Json& product = field(json, "product"); product.get<std::nullptr_t>() == nullptr) {
        only(product, {"rows", "columns", "depth"});
        out.product = Product{expression(field(product, "rows"), out), expression(field(product, "columns"), out),
                              expression(field(product, "depth"), out)};
        check_product(out);
    }
    return out;
}

std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

}  // namespace

Launch Launch::from_json(std::string_view data) {
    try {
        return read(data);
    } catch (const Failure& failure) {
        unreadable(failure.error().message);
    }
}

std::int64_t Expression::evaluate(const Dims& dims) const {
    if (operation == Operation::kConstant) return value;
    if (operation == Operation::kDim) {
        if (input >= dims.size() || axis >= dims[input].size())
            throw LaunchError("got shapes " + shapes_text(dims) + ", which have no axis " + std::to_string(axis) + " of input " +
                              std::to_string(input));
        return dims[input][axis];
    }
    const std::int64_t a = parts[0].evaluate(dims), b = parts[1].evaluate(dims);
    std::int64_t out = 0;
    bool overflow = false;
    switch (operation) {
        case Operation::kAdd: overflow = __builtin_add_overflow(a, b, &out); break;
        case Operation::kSub: overflow = __builtin_sub_overflow(a, b, &out); break;
        case Operation::kMul: overflow = __builtin_mul_overflow(a, b, &out); break;
        case Operation::kMin: return std::min(a, b);
        case Operation::kMax: return std::max(a, b);
        default:
            overflow = b == 0 || (b == -1 && a == std::numeric_limits<std::int64_t>::min()) || a == std::numeric_limits<std::int64_t>::min();
            if (!overflow) out = operation == Operation::kFloorDiv ? floor_div(a, b) : -floor_div(-a, b);
    }
    if (overflow) throw LaunchError("got shapes " + shapes_text(dims) + ", on which an expression has no value of 64 bits");
    return out;
}

std::size_t Launch::cubins_size() const {
    std::int64_t size = 0;
    for (const auto& [sm, kernel] : kernels) size = std::max(size, kernel.offset + kernel.size);
    return static_cast<std::size_t>(size);
}

std::string_view Launch::cubin(std::string_view cubins, const std::string& sm) const {
    const auto found = kernels.find(sm);
    if (found == kernels.end()) {
        std::string known;
        for (const auto& [name, kernel] : kernels) known += (known.empty() ? "" : ", ") + name;
        throw LaunchError(op + ": got a GPU of architecture " + sm + "; this engine has kernels for " + known +
                          ". Build it again with " + sm + " among its targets");
    }
    const Kernel& kernel = found->second;
    const auto offset = std::min(static_cast<std::size_t>(kernel.offset), cubins.size());
    const std::string_view cubin = cubins.substr(offset, static_cast<std::size_t>(kernel.size));
    if (sana::sha256(cubin) != kernel.sha256) {
        throw LaunchError(op + ", " + sm + ": the cubin's SHA-256 is not " + kernel.sha256 +
                          ", as expected. Build the engine again");
    }
    return cubin;
}

std::string shapes_text(const Dims& dims) {
    std::string out;
    for (const auto& shape : dims) {
        std::string one;
        for (const std::int64_t size : shape) one += (one.empty() ? "" : ", ") + std::to_string(size);
        out += (out.empty() ? "(" : ", (") + one + (shape.size() == 1 ? ",)" : ")");
    }
    return "[" + out + "]";
}

}  // namespace sana::plugins
