// What stands between a request and compiled graphs. As runtime/session.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace sana {

struct Tensor {
    std::vector<std::int64_t> shape;
    std::variant<std::vector<float>, std::vector<std::int64_t>> data;

    std::vector<float>& floats() { return std::get<0>(data); }
    const std::vector<float>& floats() const { return std::get<0>(data); }
};

using Inputs = std::map<std::string, const Tensor*>;
using Outputs = std::map<std::string, Tensor>;

// One component: tensors by the graph's input names in, by its output names out. docs/bundle.md lists both.
class Session {
  public:
    virtual ~Session() = default;
    virtual Outputs run(const Inputs& inputs) = 0;
};

}  // namespace sana
