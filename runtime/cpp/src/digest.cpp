#include "digest.hpp"

#include <openssl/evp.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>

#include "each.hpp"
#include "failure.hpp"

namespace sana {
namespace {

constexpr std::size_t kBlockBytes = 1 << 17;           // hashing dominates the calls, and threads leave no large heaps behind
constexpr unsigned kMinThreads = 4, kMaxThreads = 32;  // some may wait for a disk; past 32 they wait for memory

class Sha256 {
  public:
    Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
        if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) fail();
    }
    void update(const void* data, std::size_t size) {
        if (EVP_DigestUpdate(context_.get(), data, size) != 1) fail();
    }
    std::string hex() {
        unsigned char bytes[EVP_MAX_MD_SIZE];
        unsigned size = 0;
        if (EVP_DigestFinal_ex(context_.get(), bytes, &size) != 1) fail();
        std::string out;
        for (unsigned i = 0; i < size; ++i) {
            static constexpr char kDigits[] = "0123456789abcdef";
            out += kDigits[bytes[i] >> 4];
            out += kDigits[bytes[i] & 15];
        }
        return out;
    }

  private:
    [[noreturn]] static void fail() {
        throw Failure(ErrorKind::kSana, "OpenSSL cannot compute SHA-256. Is it set to an unusual provider?");
    }
    std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context_;
};

std::string span_sha256(const Span& span, const std::string& bundle, const std::function<void(std::size_t)>& advance) {
    const std::string& path = span.path;
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file)
        throw Failure(ErrorKind::kMissingFile,
                      bundle + ": the bundle was replaced while it was read (" + path + "). Open it again.");
    std::setvbuf(file.get(), nullptr, _IONBF, 0);
    std::vector<unsigned char> block(kBlockBytes);
    Sha256 digest;
    const bool sought = fseeko(file.get(), span.start, SEEK_SET) == 0;
    std::uint64_t left = span.size ? static_cast<std::uint64_t>(*span.size) : std::numeric_limits<std::uint64_t>::max();
    while (const std::size_t size =
               sought ? std::fread(block.data(), 1, std::min<std::uint64_t>(block.size(), left), file.get()) : 0) {
        digest.update(block.data(), size);
        advance(size);
        left -= size;
    }
    if (!sought || std::ferror(file.get())) throw Failure(ErrorKind::kBundle, path + ": cannot be read. Copy the bundle again.");
    return digest.hex();
}

}  // namespace

std::string sha256(std::string_view data, std::string_view more) {
    Sha256 digest;
    digest.update(data.data(), data.size());
    digest.update(more.data(), more.size());
    return digest.hex();
}

std::size_t num_parts(std::int64_t size) {
    return size > kPartBytes ? static_cast<std::size_t>((size + kPartBytes - 1) / kPartBytes) : 0;
}

std::vector<Span> parts_of(const std::string& path, std::int64_t size) {
    std::vector<Span> parts(num_parts(size), {path, 0, kPartBytes});
    for (std::size_t i = 0; i < parts.size(); ++i) parts[i].start = static_cast<std::int64_t>(i) * kPartBytes;
    if (!parts.empty()) parts.back().size.reset();
    return parts;
}

std::vector<std::string> spans_sha256(const std::vector<Span>& spans, const std::string& bundle,
                                      const std::function<void(std::size_t)>& progress) {
    std::vector<std::string> digests(spans.size());
    std::mutex lock;
    const auto advance = [&](std::size_t bytes) {
        const std::lock_guard held(lock);
        if (progress) progress(bytes);
    };
    each(spans.size(), std::clamp(std::thread::hardware_concurrency(), kMinThreads, kMaxThreads),
         [&](std::size_t i) { digests[i] = span_sha256(spans[i], bundle, advance); });
    return digests;
}

}  // namespace sana
