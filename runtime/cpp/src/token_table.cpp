#include "token_table.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include "failure.hpp"
#include "json.hpp"
#include "narrow_floats.hpp"
#include "python_text.hpp"

namespace sana {
namespace {

constexpr const char* kTensor = "token_table";
constexpr std::uint64_t kMaxHeader = 4096;  // bytes of JSON; ours has about a hundred
const std::map<std::string, std::string> kTypes = {{"fp32", "F32"}, {"fp16", "F16"}, {"bf16", "BF16"}};

std::uint64_t bytes_of(const std::string& precision) { return precision == "fp32" ? 4 : 2; }

Failure wrong(const std::string& path, const std::string& what) { return {ErrorKind::kBundle, path + ": " + what}; }

class File {
  public:
    explicit File(const std::string& path) : descriptor(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        struct stat info{};
        if (descriptor < 0 || fstat(descriptor, &info) != 0) {
            const Failure failure = wrong(path, std::string("cannot be read (") + std::strerror(errno) + ").");
            if (descriptor >= 0) close(descriptor);  // nothing destroys what was not made
            throw failure;
        }
        size = static_cast<std::uint64_t>(info.st_size);
    }
    ~File() { close(descriptor); }
    File(const File&) = delete;

    std::string read(std::size_t at, std::size_t count) const {  // less where the file ends
        std::string out(count, '\0');
        const ssize_t got = pread(descriptor, out.data(), count, static_cast<off_t>(at));
        out.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
        return out;
    }

    int descriptor;
    std::uint64_t size = 0;
};

Json header_of(const std::string& text, const std::string& path) {
    try {
        return parse_json(text, path);
    } catch (const Failure& failure) {
        throw Failure(ErrorKind::kBundle, failure.error().message);
    }
}

// Bytes before the first row.
std::uint64_t offset_of(const File& file, const std::string& path, std::int64_t rows, std::int64_t channels,
                        const std::string& precision) {
    std::uint64_t length = 0;
    const std::string head = file.read(0, 8);
    for (std::size_t i = head.size(); i-- > 0;) length = length << 8 | static_cast<unsigned char>(head[i]);
    const std::uint64_t begin = 8 + length;
    if (length > kMaxHeader || begin > file.size) {
        throw wrong(path, "got " + std::to_string(file.size) +
                              " bytes that do not begin as a safetensors file; expected the text encoder's table of tokens. "
                              "Copy the file again, or rebuild.");
    }
    const Json header = header_of(file.read(8, static_cast<std::size_t>(length)), path);
    const Json* tensor = header.find(kTensor);
    if (tensor == nullptr || tensor->get<JsonObject>() == nullptr) {
        throw wrong(path, "got no tensor " + repr(kTensor) + "; expected the text encoder's table of tokens. Rebuild the bundle.");
    }
    const std::int64_t num_bytes = rows * channels * static_cast<std::int64_t>(bytes_of(precision));
    const auto list = [](std::int64_t a, std::int64_t b) { return "[" + std::to_string(a) + ", " + std::to_string(b) + "]"; };
    for (const auto& [key, expected] : {std::pair("dtype", repr(kTypes.at(precision))), std::pair("shape", list(rows, channels)),
                                        std::pair("data_offsets", list(0, num_bytes))}) {
        const Json* found = tensor->find(key);
        const std::string got = found == nullptr ? "None" : python_repr(*found);
        if (got != expected) {
            const std::string where = std::string(kTensor) + ": " + key;
            throw wrong(path, where + ": got " + got + "; expected " + expected + ". Rebuild the bundle.");
        }
    }
    if (file.size - begin != static_cast<std::uint64_t>(num_bytes)) {
        throw wrong(path, "got " + std::to_string(file.size - begin) + " bytes of rows; expected " + std::to_string(num_bytes) +
                              ". Copy the file again, or rebuild the bundle.");
    }
    return begin;
}

}  // namespace

TokenTable::TokenTable(std::string path, std::int64_t rows, std::int64_t channels, const std::string& precision)
    : path_(std::move(path)), rows_(rows), channels_(channels), precision_(precision) {
    if (!kTypes.contains(precision)) {
        throw wrong(path_, "got a table of tokens of precision " + precision + "; expected fp32, fp16, bf16. Rebuild.");
    }
    const File file(path_);
    begin_ = offset_of(file, path_, rows, channels, precision);
    size_ = static_cast<std::size_t>(file.size);
    void* const mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.descriptor, 0);
    if (mapped == MAP_FAILED) throw wrong(path_, "cannot be mapped into memory. Free some.");
    madvise(mapped, size_, MADV_RANDOM);  // the kernel would read rows around each that nobody asks for
    mapped_ = static_cast<const char*>(mapped);
}

TokenTable::~TokenTable() { munmap(const_cast<char*>(mapped_), size_); }

std::unique_ptr<const TokenTable> TokenTable::of(const Bundle& bundle) {
    const Manifest& m = bundle.manifest;
    if (m.token_table_rows == 0) return nullptr;
    for (const auto& [component, precision] : m.precision) {
        if (component != "text_encoder") continue;
        return std::make_unique<const TokenTable>(bundle.file(kTokenTableName), m.token_table_rows, m.caption_channels, precision);
    }
    throw wrong(bundle.path, "got a table of tokens without a text encoder; expected both. Rebuild the bundle.");
}

Tensor TokenTable::rows(const Tensor& ids) const {
    const auto& each = std::get<std::vector<std::int64_t>>(ids.data);
    for (const std::int64_t id : each) {
        if (id >= 0 && id < rows_) continue;
        throw wrong(path_, "got the token " + std::to_string(id) + "; expected 0 to " + std::to_string(rows_ - 1) +
                               ", the rows of the table. The tokenizer is of another model: rebuild the bundle.");
    }
    const std::size_t channels = static_cast<std::size_t>(channels_), row_bytes = channels * bytes_of(precision_);
    std::vector<float> out(each.size() * channels);
    std::vector<std::uint16_t> bits(channels);
    float* to = out.data();
    for (const std::int64_t id : each) {
        const char* const from = mapped_ + begin_ + static_cast<std::size_t>(id) * row_bytes;
        if (precision_ == "fp32") {
            std::memcpy(to, from, row_bytes);
        } else {
            std::memcpy(bits.data(), from, row_bytes);
            const auto widen = precision_ == "bf16" ? from_bfloat16 : from_half;
            for (std::size_t i = 0; i < channels; ++i) to[i] = widen(bits[i]);
        }
        to += channels;
    }
    Tensor found{ids.shape, std::move(out)};
    found.shape.push_back(channels_);
    return found;
}

LookedUp::LookedUp(const TokenTable* table, const Inputs& given) : inputs(given) {
    const auto ids = given.find("input_ids");
    if (table == nullptr || ids == given.end()) return;
    rows_ = table->rows(*ids->second);
    inputs.erase("input_ids");
    inputs["inputs_embeds"] = &rows_;
}

}  // namespace sana
