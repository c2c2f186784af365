// How one kernel is launched, as data. plugins/launch.py once more, which describes the format.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace sana::plugins {

using Dims = std::vector<std::vector<std::int64_t>>;  // of each input

// A node's launch description or cubins cannot be used: malformed, changed, or not made for these shapes.
struct LaunchError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Operation { kConstant, kDim, kAdd, kSub, kMul, kFloorDiv, kCeilDiv, kMin, kMax };

struct Expression {
    Operation operation = Operation::kConstant;
    std::int64_t value = 0;         // of kConstant
    std::size_t input = 0, axis = 0;  // of kDim
    std::vector<Expression> parts;  // two, of an operation

    // Raises LaunchError if the shapes do not fit it.
    std::int64_t evaluate(const Dims& dims) const;
};

struct Kernel {
    std::string entry;
    std::int64_t warps = 0, shared = 0, offset = 0, size = 0;  // bytes, but for warps
    std::string sha256;
};
struct Output {
    std::string type;
    std::vector<Expression> shape;
};
struct Product {
    Expression rows, columns, depth;
};
struct Argument {
    enum class Kind { kIn, kOut, kI32, kF32, kNull } kind = Kind::kNull;
    std::size_t index = 0;  // of kIn and kOut
    Expression expression;  // of kI32
    float number = 0;       // of kF32
};

struct Launch {
    std::string op;
    std::vector<std::string> inputs;
    std::vector<Output> outputs;
    std::vector<Expression> grid;
    std::vector<Argument> args;
    std::map<std::string, Kernel> kernels;
    std::optional<Product> product;

    // Raises LaunchError for anything that is not a launch of this format.
    static Launch from_json(std::string_view data);

    std::size_t cubins_size() const;  // bytes that the kernels take up
    // The cubin for `sm`. Raises LaunchError if there is none, or if its bytes are not those that were compiled.
    std::string_view cubin(std::string_view cubins, const std::string& sm) const;
};

std::string shapes_text(const Dims& dims);  // "[(1, 2), (3,)]"

}  // namespace sana::plugins
