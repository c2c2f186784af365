// The portable graphs in ONNX Runtime, on any machine's CPU. As runtime/ort_session.py.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ort_api.hpp"
#include "session.hpp"
#include "token_table.hpp"

namespace sana {

int default_threads();   // as many as this process may keep busy
std::string cpu_name();  // this machine's processor in words

class OrtSession : public Session {
  public:
    // num_threads: for one operator; 0 for default_threads(). library: of ONNX Runtime, "" for the usual one. Raises BundleError
    // for a graph that it does not take. tokens: their table, whose rows the graph takes in place of ids; nullptr: none.
    OrtSession(std::string path, int num_threads, const std::string& library, std::unique_ptr<const TokenTable> tokens = nullptr);

    // Inputs that the graph does not have are left out. Raises SanaError for one that is missing, and when the run fails.
    Outputs run(const Inputs& given_inputs) override;

  private:
    template <class T>
    using Owned = std::unique_ptr<T, void (*)(T*)>;

    std::string path_;
    const ort::Library& ort_;
    Owned<ort::Session> session_;
    Owned<ort::RunOptions> run_options_;
    Owned<ort::MemoryInfo> memory_;
    std::vector<std::string> inputs_, outputs_;
    std::unique_ptr<const TokenTable> tokens_;
};

}  // namespace sana
