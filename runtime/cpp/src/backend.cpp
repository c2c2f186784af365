#include "backend.hpp"

#include "failure.hpp"
#include "noise.hpp"

namespace sana {

Tensor taken(Outputs& outputs, const std::string& name) {
    const auto found = outputs.find(name);
    if (found == outputs.end()) throw Failure(ErrorKind::kBundle, "the graph gives no " + name + ". Rebuild the bundle.");
    return std::move(found->second);
}

std::vector<float> prompt_mask(const Job& job) {
    std::vector<float> out;
    for (const std::vector<Text>& row : job.texts) {
        for (const Text& text : row) out.insert(out.end(), text.selected_mask.begin(), text.selected_mask.end());
    }
    return out;
}

std::vector<float> noise_of(const CheckedRequest& request, const Job& job, std::size_t count, std::uint32_t stream) {
    std::vector<float> out;
    out.reserve(job.size() * count);
    for (std::size_t i = 0; i < job.size(); ++i) {
        const std::vector<float> one = normal(request.seeds[job.first + i], count, stream);
        out.insert(out.end(), one.begin(), one.end());
    }
    return out;
}

}  // namespace sana
