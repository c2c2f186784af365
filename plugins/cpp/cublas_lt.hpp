// Matrix products through cuBLASLt. plugins/cublas_lt.py once more, which says why, and where the numbers come from.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace sana::plugins {

constexpr std::size_t kWorkspaceAlignment = 256;                          // bytes; cuBLASLt refuses other addresses
constexpr std::size_t kProductWorkspace = (32 << 20) + kWorkspaceAlignment;  // bytes
constexpr std::uint64_t kAlignment = 16;             // bytes, of every tensor

// cuBLASLt is not installed, or refused a call.
struct CublasError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Open the library, which takes its linker a tenth of a second, before the first product does. Raises CublasError.
void open_cublas_lt();

struct ProductAddresses {  // on the device; 0 for what there is not
    std::uint64_t x, weight, bias, out, x_scale, w_scale, workspace;
};

// out = x w^T (+ bias): x (rows, depth), w (columns, depth). prepare() before run(); run() neither allocates nor waits.
class LtProduct {
  public:
    // type: "fp32", "fp16", "bf16" or "fp8". context_id: of the current CUDA context. Raises CublasError without the library.
    LtProduct(const std::string& type, bool bias, unsigned long long context_id);
    ~LtProduct();
    LtProduct(const LtProduct&) = delete;
    LtProduct& operator=(const LtProduct&) = delete;

    void prepare(std::int64_t rows, std::int64_t columns, std::int64_t depth);  // chooses the algorithm for this size
    void run(const ProductAddresses& at, void* stream);

  private:
    struct Heuristic {  // cublasLtMatmulHeuristicResult_t
        std::uint64_t algo[8];
        std::size_t workspace;
        int state;
        float waves;
        int reserved[4];
    };

    static float filled(const Heuristic& algorithm);  // how much of its waves; 1 where cuBLASLt does not say
    std::vector<Heuristic> named();                   // what the heuristic answers, best first
    std::optional<Heuristic> checked(const Heuristic& algorithm) const;  // as it would run for this description, if it would
    void scale_by(std::int32_t mode);
    void describe(int attribute, const void* value, std::size_t size);
    void point(std::uint64_t bias, std::uint64_t w_scale, std::uint64_t x_scale);
    void free_layouts();

    int type_, out_type_;
    bool scaled_, bias_;
    void *lt_, *description_ = nullptr;
    std::vector<void*> layouts_;         // of w, x and out
    std::vector<Heuristic> candidates_;  // best first
    std::array<std::int64_t, 3> size_{};
};

}  // namespace sana::plugins
