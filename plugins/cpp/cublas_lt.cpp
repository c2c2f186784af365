#include "cublas_lt.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <sstream>

namespace sana::plugins {
namespace {

constexpr int kCandidates = 8;
constexpr int kCompute32F = 68, kScale32F = 0;
constexpr int kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8;
constexpr std::int32_t kTransposed = 1, kWithBias = 4, kANumber = 0, kANumberARow = 3;
constexpr int kScalePointers[] = {17, 18}, kScaleModes[] = {31, 32};  // of A, of B
constexpr int kFastAccumulation = 25;
constexpr float kWellFilled = 0.8f;
constexpr int kMaxWorkspace = 1, kAlignments[] = {5, 6, 7, 8};  // preferences
constexpr int kInvalidValue = 7, kNotSupported = 15;            // refusals: nothing was queued

int type_number(const std::string& type) {
    static const std::map<std::string, int> numbers = {{"fp32", 0}, {"fp16", 2}, {"bf16", 14}, {"fp8", 28}};
    return numbers.at(type);
}

struct Library {
    int (*create)(void**);
    int (*desc_create)(void**, int, int);
    int (*desc_destroy)(void*);
    int (*desc_set)(void*, int, const void*, std::size_t);
    int (*layout_create)(void**, int, std::uint64_t, std::uint64_t, std::int64_t);
    int (*layout_destroy)(void*);
    int (*preference_create)(void**);
    int (*preference_destroy)(void*);
    int (*preference_set)(void*, int, const void*, std::size_t);
    int (*heuristic)(void*, void*, void*, void*, void*, void*, void*, int, void*, int*);
    int (*check)(void*, void*, void*, void*, void*, void*, const void*, void*);
    int (*matmul)(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
                  const void*, void*, std::size_t, void*);
};

template <class Function>
void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) throw CublasError(std::string("got a cuBLASLt without ") + name + "; expected version 12 or 13");
}

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> out;
    std::istringstream stream(text);
    for (std::string each; std::getline(stream, each, ':');) out.push_back(each);
    return out;
}

// Those of SANA_CUBLASLT, with a colon between one and the next, else those on the search path. The first that loads.
Library opened() {
    std::vector<std::string> paths = {"libcublasLt.so.13", "libcublasLt.so.12"};
    if (const char* named = std::getenv("SANA_CUBLASLT"); named != nullptr && *named) paths = split(named);
    std::string tried;
    void* library = nullptr;
    for (const std::string& path : paths) {
        library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library != nullptr) break;
        tried += (tried.empty() ? "" : "; ") + std::string(dlerror());
    }
    if (library == nullptr) {
        throw CublasError("got no cuBLASLt (" + tried + "); expected CUDA's, which engines for this GPU run their matrix products "
                          "with. Install it, or set SANA_CUBLASLT to the path of libcublasLt.so.13");
    }
    Library out{};
    find(library, "cublasLtCreate", out.create);
    find(library, "cublasLtMatmulDescCreate", out.desc_create);
    find(library, "cublasLtMatmulDescDestroy", out.desc_destroy);
    find(library, "cublasLtMatmulDescSetAttribute", out.desc_set);
    find(library, "cublasLtMatrixLayoutCreate", out.layout_create);
    find(library, "cublasLtMatrixLayoutDestroy", out.layout_destroy);
    find(library, "cublasLtMatmulPreferenceCreate", out.preference_create);
    find(library, "cublasLtMatmulPreferenceDestroy", out.preference_destroy);
    find(library, "cublasLtMatmulPreferenceSetAttribute", out.preference_set);
    find(library, "cublasLtMatmulAlgoGetHeuristic", out.heuristic);
    find(library, "cublasLtMatmulAlgoCheck", out.check);
    find(library, "cublasLtMatmul", out.matmul);
    return out;
}

const Library& library() {
    static const Library found = opened();
    return found;
}

void ok(int status, const char* name) {
    if (status != 0) {
        throw CublasError(std::string(name) + ": got status " + std::to_string(status) +
                          " (CUBLAS_STATUS_…, cublas_api.h); expected 0");
    }
}

// One for each CUDA context, which must be the current one; never destroyed.
void* handle(unsigned long long context_id) {
    static std::mutex lock;
    static std::map<unsigned long long, void*> handles;
    const std::lock_guard held(lock);
    void*& found = handles[context_id];
    if (found == nullptr) ok(library().create(&found), "cublasLtCreate");
    return found;
}

}  // namespace

void open_cublas_lt() { library(); }

LtProduct::LtProduct(const std::string& type, bool bias, unsigned long long context_id)
    : type_(type_number(type)), out_type_(type == "fp8" ? type_number("fp16") : type_), scaled_(type == "fp8"), bias_(bias),
      lt_(handle(context_id)) {
    ok(library().desc_create(&description_, kCompute32F, kScale32F), "cublasLtMatmulDescCreate");
    // Column by column, as cuBLAS sees memory: out^T (columns, rows) = w, transposed, times x^T.
    describe(kTransposeA, &kTransposed, sizeof kTransposed);
    if (bias_) describe(kEpilogue, &kWithBias, sizeof kWithBias);
    if (scaled_) {
        scale_by(kANumberARow);
        const std::int8_t fast = 1;
        describe(kFastAccumulation, &fast, sizeof fast);
    }
}

LtProduct::~LtProduct() {
    free_layouts();
    if (description_ != nullptr) library().desc_destroy(description_);
}

void LtProduct::describe(int attribute, const void* value, std::size_t size) {
    ok(library().desc_set(description_, attribute, value, size), "cublasLtMatmulDescSetAttribute");
}

void LtProduct::scale_by(std::int32_t mode) {
    for (const int attribute : kScaleModes) describe(attribute, &mode, sizeof mode);
}

float LtProduct::filled(const Heuristic& algorithm) {
    return algorithm.waves > 0 ? algorithm.waves / std::ceil(algorithm.waves) : 1;
}

void LtProduct::prepare(std::int64_t rows, std::int64_t columns, std::int64_t depth) {
    free_layouts();
    const auto layout = [this](int type, std::int64_t height, std::int64_t width) {
        void* made = nullptr;
        ok(library().layout_create(&made, type, static_cast<std::uint64_t>(height), static_cast<std::uint64_t>(width), height),
           "cublasLtMatrixLayoutCreate");
        layouts_.push_back(made);
    };
    layout(type_, depth, columns);
    layout(type_, depth, rows);
    layout(out_type_, columns, rows);
    size_ = {rows, columns, depth};
    candidates_ = named();
    if (scaled_ && !candidates_.empty() && filled(candidates_.front()) < kWellFilled) {
        scale_by(kANumber);
        const std::vector<Heuristic> others = named();  // if it throws, so does the engine's build: nothing is run afterwards
        scale_by(kANumberARow);
        const float own = filled(candidates_.front());
        std::vector<Heuristic> better;
        for (const Heuristic& each : others) {
            const std::optional<Heuristic> accepted = checked(each);
            if (accepted && filled(*accepted) > own) better.push_back(*accepted);
        }
        candidates_.insert(candidates_.begin(), better.begin(), better.end());
    }
    if (candidates_.empty()) {
        throw CublasError("got no algorithm for " + std::to_string(rows) + " x " + std::to_string(columns) + " x " +
                          std::to_string(depth) + "; expected one");
    }
}

std::optional<LtProduct::Heuristic> LtProduct::checked(const Heuristic& algorithm) const {
    Heuristic found{};
    void *w = layouts_[0], *x = layouts_[1], *out = layouts_[2];
    const int status = library().check(lt_, description_, w, x, out, out, algorithm.algo, &found);
    std::copy(std::begin(algorithm.algo), std::end(algorithm.algo), std::begin(found.algo));
    const bool runs = status == 0 && found.state == 0 && found.workspace <= kProductWorkspace - kWorkspaceAlignment;
    return runs ? std::optional(found) : std::nullopt;
}

std::vector<LtProduct::Heuristic> LtProduct::named() {
    void* preference = nullptr;
    ok(library().preference_create(&preference), "cublasLtMatmulPreferenceCreate");
    std::vector<Heuristic> answers(kCandidates);
    int found = 0;
    try {
        const std::uint64_t most = kProductWorkspace - kWorkspaceAlignment;
        ok(library().preference_set(preference, kMaxWorkspace, &most, sizeof most), "cublasLtMatmulPreferenceSetAttribute");
        const auto alignment = static_cast<std::uint32_t>(kAlignment);
        for (const int each : kAlignments)
            ok(library().preference_set(preference, each, &alignment, sizeof alignment), "cublasLtMatmulPreferenceSetAttribute");
        point(kAlignment, kAlignment, kAlignment);  // any: that there are some decides which algorithms fit
        ok(library().heuristic(lt_, description_, layouts_[0], layouts_[1], layouts_[2], layouts_[2], preference, kCandidates,
                               answers.data(), &found),
           "cublasLtMatmulAlgoGetHeuristic");
    } catch (...) {
        library().preference_destroy(preference);
        throw;
    }
    ok(library().preference_destroy(preference), "cublasLtMatmulPreferenceDestroy");
    answers.resize(static_cast<std::size_t>(found));
    std::erase_if(answers, [](const Heuristic& each) { return each.state != 0; });
    return answers;
}

void LtProduct::point(std::uint64_t bias, std::uint64_t w_scale, std::uint64_t x_scale) {
    if (bias_) describe(kBiasPointer, &bias, sizeof bias);
    if (scaled_) {
        describe(kScalePointers[0], &w_scale, sizeof w_scale);
        describe(kScalePointers[1], &x_scale, sizeof x_scale);
    }
}

void LtProduct::run(const ProductAddresses& at, void* stream) {
    point(at.bias, at.w_scale, at.x_scale);
    const auto device = [](std::uint64_t address) { return reinterpret_cast<void*>(address); };
    const float alpha = 1, beta = 0;
    const std::string size =
        "(" + std::to_string(size_[0]) + ", " + std::to_string(size_[1]) + ", " + std::to_string(size_[2]) + ")";
    while (true) {
        if (at.workspace == 0) std::erase_if(candidates_, [](const Heuristic& each) { return each.workspace != 0; });
        if (candidates_.empty()) throw CublasError("got no algorithm for " + size + " without a workspace; expected one");
        const Heuristic& best = candidates_.front();
        // TensorRT aligns a workspace to less than cuBLASLt accepts, even where the algorithm needs none.
        const std::uint64_t given =
            best.workspace == 0 ? 0 : (at.workspace + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
        const int status = library().matmul(lt_, description_, &alpha, device(at.weight), layouts_[0], device(at.x), layouts_[1],
                                            &beta, device(at.out), layouts_[2], device(at.out), layouts_[2], &best,
                                            device(given), given != 0 ? kProductWorkspace - kWorkspaceAlignment : 0, stream);
        if (status == 0) return;
        if ((status != kInvalidValue && status != kNotSupported) || candidates_.size() == 1) {
            throw CublasError("cublasLtMatmul: got status " + std::to_string(status) + " (CUBLAS_STATUS_…, cublas_api.h) for " +
                              size + ", whose algorithm needs " + std::to_string(best.workspace) +
                              " bytes of workspace; expected 0");
        }
        candidates_.erase(candidates_.begin());  // for this size it is out
    }
}

void LtProduct::free_layouts() {
    for (void* layout : layouts_) library().layout_destroy(layout);
    layouts_.clear();
}

}  // namespace sana::plugins
