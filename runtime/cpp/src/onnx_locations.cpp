#include "onnx_locations.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <string_view>

#include "failure.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

constexpr std::size_t kMaxGraphBytes = std::size_t{512} << 20;
constexpr int kMaxDepth = 64;  // graphs in attributes of nodes of graphs

enum class Message { kNone, kModel, kTraining, kGraph, kFunction, kNode, kAttribute, kSparse, kTensor, kEntry };

struct Child {
    Message of;
    std::uint64_t field;
    Message holds;
};
// Of all messages, those that can contain a tensor. Field numbers: onnx.proto3.
constexpr Child kChildren[] = {
    {Message::kModel, 7, Message::kGraph},       {Message::kModel, 20, Message::kTraining},
    {Message::kModel, 25, Message::kFunction},   {Message::kTraining, 1, Message::kGraph},
    {Message::kTraining, 2, Message::kGraph},    {Message::kGraph, 1, Message::kNode},
    {Message::kGraph, 5, Message::kTensor},      {Message::kGraph, 15, Message::kSparse},
    {Message::kFunction, 7, Message::kNode},     {Message::kFunction, 11, Message::kAttribute},
    {Message::kNode, 5, Message::kAttribute},    {Message::kAttribute, 5, Message::kTensor},
    {Message::kAttribute, 6, Message::kGraph},   {Message::kAttribute, 10, Message::kTensor},
    {Message::kAttribute, 11, Message::kGraph},  {Message::kAttribute, 22, Message::kSparse},
    {Message::kAttribute, 23, Message::kSparse}, {Message::kSparse, 1, Message::kTensor},
    {Message::kSparse, 2, Message::kTensor},     {Message::kTensor, 13, Message::kEntry},
};

Message child(Message of, std::uint64_t field) {
    for (const Child& each : kChildren) {
        if (each.of == of && each.field == field) return each.holds;
    }
    return Message::kNone;
}

struct NotOnnx {
    std::string why;
};

class Walker {
  public:
    explicit Walker(std::string_view data) : data_(data) {}

    void walk(std::size_t at, std::size_t end, Message message, int depth) {
        if (depth == 0) throw NotOnnx{"nested more than " + std::to_string(kMaxDepth) + " deep"};
        std::string_view key, value;
        while (at < end) {
            const std::uint64_t tag = varint(at, end);
            const unsigned wire = tag & 7;
            if (wire == 2) {
                const std::uint64_t length = varint(at, end);
                if (length > end - at) {
                    throw NotOnnx{"a field of " + std::to_string(length) + " bytes at " + std::to_string(at) + " where " +
                                  std::to_string(end - at) + " are left"};
                }
                const std::uint64_t field = tag >> 3;
                if (const Message holds = child(message, field); holds != Message::kNone) {
                    walk(at, at + length, holds, depth - 1);
                } else if (message == Message::kEntry && field == 1) {
                    key = data_.substr(at, length);
                } else if (message == Message::kEntry && field == 2) {
                    value = data_.substr(at, length);
                }
                at += length;
            } else if (wire == 0) {
                varint(at, end);
            } else if (wire == 1 || wire == 5) {
                at += wire == 1 ? 8 : 4;
            } else {
                throw NotOnnx{"wire type " + std::to_string(wire) + " at " + std::to_string(at)};
            }
        }
        if (at != end) throw NotOnnx{"a field passes its end at " + std::to_string(end)};
        if (key == "location") {
            if (const std::string error = utf8_error(value); !error.empty()) throw NotOnnx{error};
            found.emplace(value);
        }
    }

    std::set<std::string> found;

  private:
    // Python's integers have no end; ten bytes hold 70 bits, of which the highest only decide that a length is too long.
    std::uint64_t varint(std::size_t& at, std::size_t end) const {
        unsigned __int128 value = 0;
        for (int shift = 0; shift < 70; shift += 7) {
            if (at >= end) throw NotOnnx{"cut off at " + std::to_string(at)};
            const auto byte = static_cast<unsigned char>(data_[at++]);
            value |= static_cast<unsigned __int128>(byte & 0x7F) << shift;
            if (byte < 0x80) return value > UINT64_MAX ? UINT64_MAX : static_cast<std::uint64_t>(value);
        }
        throw NotOnnx{"a number of more than 10 bytes at " + std::to_string(at)};
    }

    std::string_view data_;
};

class Mapped {
  public:
    explicit Mapped(const std::string& path) {
        descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        struct stat info{};
        if (descriptor_ < 0 || fstat(descriptor_, &info) != 0)
            throw Failure(ErrorKind::kBundle, path + ": cannot be read. Copy the bundle again.");
        size = static_cast<std::size_t>(info.st_size);
    }
    Mapped(const Mapped&) = delete;
    Mapped& operator=(const Mapped&) = delete;
    ~Mapped() {
        if (data_ != MAP_FAILED) munmap(data_, size);
        if (descriptor_ >= 0) close(descriptor_);
    }
    std::string_view map() {
        data_ = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor_, 0);
        return data_ == MAP_FAILED ? std::string_view() : std::string_view(static_cast<const char*>(data_), size);
    }

    std::size_t size = 0;

  private:
    int descriptor_ = -1;
    void* data_ = MAP_FAILED;
};

}  // namespace

std::set<std::string> external_locations(const std::string& path) {
    Mapped file(path);
    if (file.size == 0 || file.size > kMaxGraphBytes) {
        throw Failure(ErrorKind::kBundle, path + ": got " + std::to_string(file.size) + " bytes; expected 1 to " +
                                              std::to_string(kMaxGraphBytes) + " for a graph whose weights are beside it.");
    }
    const std::string_view data = file.map();
    if (data.empty()) throw Failure(ErrorKind::kBundle, path + ": cannot be mapped into memory. Free some.");
    Walker walker(data);
    try {
        walker.walk(0, data.size(), Message::kModel, kMaxDepth);
    } catch (const NotOnnx& error) {
        throw Failure(ErrorKind::kBundle, path + ": not an ONNX file (" + error.why + "). Copy it again, or rebuild.");
    }
    return walker.found;
}

}  // namespace sana
