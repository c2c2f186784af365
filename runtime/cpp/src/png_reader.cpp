#include "png_reader.hpp"

#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#include "failure.hpp"
#include "picture_info.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

constexpr std::string_view kSignature = "\x89PNG\r\n\x1a\n";
constexpr std::string_view kKeyword = "sana";
constexpr std::uint32_t kMaxSide = 16384;  // px, of what a picture's info may say
constexpr std::size_t kMaxFileBytes = std::size_t{1} << 30;
constexpr std::size_t kInflateBytes = 1 << 16;  // inflated at a time

Failure no_png(const std::string& source, const std::string& why) {
    return {ErrorKind::kRequest, source + ": cannot be read as a PNG (" + why + "); expected a picture that sana drew."};
}

Failure no_pixels(const std::string& source, const std::string& why) {
    return {ErrorKind::kRequest, source + ": the pixels cannot be read (" + why + "). Was the file cut off?"};
}

std::uint32_t number_at(std::string_view data, std::size_t at) {
    std::uint32_t out = 0;
    for (std::size_t i = 0; i < 4; ++i) out = out << 8 | static_cast<unsigned char>(data[at + i]);
    return out;
}

struct Chunk {
    std::string_view kind, body;
};

// The next chunk, whose checksum is right. Empty, with a reason, where the data ends or is damaged.
std::optional<Chunk> next_chunk(std::string_view data, std::size_t& at, std::string& why) {
    why = "it ends too early";
    if (data.size() - at < 12) return {};
    const std::size_t size = number_at(data, at);
    if (size > data.size() - at - 12) return {};
    const Chunk chunk{data.substr(at + 4, 4), data.substr(at + 8, size)};
    const auto* covered = reinterpret_cast<const unsigned char*>(data.data()) + at + 4;
    if (crc32_z(0, covered, size + 4) != number_at(data, at + 8 + size)) {
        why = "a checksum is wrong";
        return {};
    }
    at += size + 12;
    return chunk;
}

// A zlib stream, given to `take` as it comes, until that returns false. False if the stream is damaged or ends too early.
class Inflater {
  public:
    Inflater() {
        if (inflateInit(&stream_) != Z_OK) throw std::bad_alloc();
    }
    Inflater(const Inflater&) = delete;
    ~Inflater() { inflateEnd(&stream_); }

    bool feed(std::string_view data, const std::function<bool(std::string_view)>& take) {
        unsigned char block[kInflateBytes];
        stream_.next_in = reinterpret_cast<unsigned char*>(const_cast<char*>(data.data()));
        stream_.avail_in = static_cast<uInt>(data.size());
        do {
            stream_.next_out = block;
            stream_.avail_out = sizeof block;
            const int status = inflate(&stream_, Z_NO_FLUSH);
            if (status == Z_MEM_ERROR) throw std::bad_alloc();
            if (status != Z_OK && status != Z_STREAM_END && status != Z_BUF_ERROR) return false;
            if (!take({reinterpret_cast<const char*>(block), sizeof block - stream_.avail_out})) return true;
            ended = status == Z_STREAM_END;
        } while (!ended && stream_.avail_out == 0);
        return true;
    }

    bool ended = false;

  private:
    z_stream stream_{};
};

std::optional<std::string> inflated(std::string_view data) {  // nothing if it is damaged; cut where it is too long for an info
    std::string out;
    Inflater inflater;
    const bool fine = inflater.feed(data, [&](std::string_view part) {
        out.append(part);
        return out.size() <= kMaxInfoBytes;
    });
    if (!fine || !(inflater.ended || out.size() > kMaxInfoBytes)) return {};
    return out;
}

std::string from_latin_1(std::string_view text) {
    std::string out;
    for (const char c : text) append(out, static_cast<unsigned char>(c));
    return out;
}

std::string_view cut_at_nul(std::string_view& rest) {  // what stands before the next NUL, which goes with it
    const std::string_view head = rest.substr(0, rest.find('\0'));
    rest.remove_prefix(std::min(rest.size(), head.size() + 1));
    return head;
}

// The text of a chunk whose keyword is ours; PNG specification, section 11.3.3.
std::optional<std::string> text_of(const Chunk& chunk) {
    if (chunk.kind != "iTXt" && chunk.kind != "tEXt" && chunk.kind != "zTXt") return {};
    std::string_view rest = chunk.body;
    if (cut_at_nul(rest) != kKeyword) return {};
    if (chunk.kind == "tEXt") return from_latin_1(rest);
    if (chunk.kind == "zTXt") {
        if (rest.empty() || rest[0] != 0) return {};
        const auto text = inflated(rest.substr(1));
        return text ? std::optional(from_latin_1(*text)) : std::nullopt;
    }
    if (rest.size() < 2 || (rest[0] != 0 && rest[1] != 0)) return {};
    const bool compressed = rest[0] != 0;
    rest.remove_prefix(2);
    cut_at_nul(rest);  // language
    cut_at_nul(rest);  // keyword in that language
    auto text = compressed ? inflated(rest) : std::optional<std::string>(rest);
    return text && utf8_error(*text).empty() ? text : std::nullopt;
}

struct Header {
    std::uint32_t width = 0, height = 0;
    unsigned char depth = 0, colours = 0, interlace = 0;
};

// Reads up to the first IDAT chunk, whose beginning `at` becomes.
Header read_head(std::string_view data, const std::string& source, std::size_t& at, std::optional<std::string>& info) {
    if (!data.starts_with(kSignature)) throw no_png(source, "it does not begin as one");
    at = kSignature.size();
    Header out;
    for (bool first = true;; first = false) {
        std::string why;
        if (data.size() - at >= 12 && data.substr(at + 4, 4) == "IDAT" && !first) return out;  // read with the pixels
        const std::optional<Chunk> chunk = next_chunk(data, at, why);
        if (!chunk) throw no_png(source, why);
        if (first != (chunk->kind == "IHDR") || (first && chunk->body.size() != 13)) throw no_png(source, "its header is not one");
        if (first) {
            out = {number_at(chunk->body, 0), number_at(chunk->body, 4), static_cast<unsigned char>(chunk->body[8]),
                   static_cast<unsigned char>(chunk->body[9]), static_cast<unsigned char>(chunk->body[12])};
        } else if (chunk->kind == "IEND") {
            throw no_png(source, "it has no pixels");
        } else if (auto text = text_of(*chunk)) {
            info = std::move(text);
        }
    }
}

std::uint8_t paeth(int left, int up, int corner) {  // PNG specification, section 9.4
    const int estimate = left + up - corner;
    const int a = std::abs(estimate - left), b = std::abs(estimate - up), c = std::abs(estimate - corner);
    return static_cast<std::uint8_t>(a <= b && a <= c ? left : b <= c ? up : corner);
}

// Takes the filter of a row back; section 9.2. False for a filter that there is not.
bool unfilter(std::uint8_t filter, std::uint8_t* row, const std::uint8_t* above, std::size_t size, std::size_t channels) {
    if (filter > 4) return false;
    for (std::size_t i = 0; i < size; ++i) {
        const int left = i >= channels ? row[i - channels] : 0, up = above[i], corner = i >= channels ? above[i - channels] : 0;
        const int guess = filter == 1   ? left
                          : filter == 2 ? up
                          : filter == 3 ? (left + up) / 2
                          : filter == 4 ? paeth(left, up, corner)
                                        : 0;
        row[i] = static_cast<std::uint8_t>(row[i] + guess);
    }
    return true;
}

// RGB. Grows as pixels come out of the file, so that a header alone costs no memory.
std::vector<std::uint8_t> read_pixels(std::string_view data, std::size_t at, const Header& header, const std::string& source) {
    if (header.depth != 8 || (header.colours != 2 && header.colours != 6) || header.interlace != 0) {
        throw no_pixels(source, "got " + std::to_string(header.depth) + " bits, colour type " + std::to_string(header.colours) +
                                    (header.interlace ? ", interlaced" : "") + "; expected 8 bits, RGB or RGBA, not interlaced");
    }
    if (header.width < 1 || header.height < 1 || header.width > kMaxSide || header.height > kMaxSide) {
        throw no_pixels(source, "got " + std::to_string(header.width) + "x" + std::to_string(header.height) +
                                    " px; expected 1 to " + std::to_string(kMaxSide) + " each");
    }
    const std::size_t channels = header.colours == 2 ? 3 : 4, size = header.width * channels;
    std::vector<std::uint8_t> out, row, above(size);
    std::string why;
    std::uint32_t rows = 0;
    const auto take = [&](std::string_view part) {
        while (!part.empty() && rows < header.height) {
            const std::size_t wanted = std::min(part.size(), size + 1 - row.size());
            row.insert(row.end(), part.begin(), part.begin() + static_cast<std::ptrdiff_t>(wanted));
            part.remove_prefix(wanted);
            if (row.size() <= size) break;
            if (!unfilter(row[0], row.data() + 1, above.data(), size, channels))
                throw no_pixels(source, "a row's filter is unknown");
            for (std::size_t x = 0; x < header.width; ++x)
                out.insert(out.end(), &row[1 + x * channels], &row[1 + x * channels] + 3);
            above.assign(row.begin() + 1, row.end());
            row.clear();
            ++rows;
        }
        return rows < header.height;
    };
    Inflater inflater;
    while (rows < header.height && !inflater.ended) {
        const std::optional<Chunk> chunk = next_chunk(data, at, why);
        if (!chunk) throw no_pixels(source, why);
        if (chunk->kind != "IDAT") break;
        if (!inflater.feed(chunk->body, take)) throw no_pixels(source, "their compression is broken");
    }
    if (rows < header.height) {
        throw no_pixels(source, "got " + std::to_string(rows) + " rows of " + std::to_string(header.height));
    }
    return out;
}

}  // namespace

std::optional<std::string> png_info(std::string_view data, const std::string& source) {
    std::size_t at = 0;
    std::optional<std::string> info;
    read_head(data, source, at, info);
    return info;
}

Image decode_png(std::string_view data, const std::string& source) {
    std::size_t at = 0;
    std::optional<std::string> info;
    const Header header = read_head(data, source, at, info);
    if (!info) {
        throw Failure(ErrorKind::kRequest,
                      source + ": a PNG without metadata of sana; expected a picture that sana drew. Some programs drop metadata.");
    }
    parse_picture_info(*info, source + " (metadata)");
    std::vector<std::uint8_t> pixels = read_pixels(data, at, header, source);
    return {static_cast<int>(header.width), static_cast<int>(header.height), std::move(pixels), std::move(*info)};
}

Result<Image> read_png(const std::string& path) {
    return guard([&] {
        errno = 0;
        const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
        if (!file && errno == ENOENT) throw Failure(ErrorKind::kRequest, path + ": no such file; expected a PNG that sana drew.");
        if (!file) throw no_png(path, std::strerror(errno));
        std::string data;
        char block[kInflateBytes];
        while (const std::size_t size = std::fread(block, 1, sizeof block, file.get())) {
            data.append(block, size);
            if (data.size() > kMaxFileBytes) throw no_png(path, "it has more than " + std::to_string(kMaxFileBytes) + " bytes");
        }
        if (std::ferror(file.get())) throw no_png(path, std::strerror(errno));
        return decode_png(data, path);
    });
}

}  // namespace sana
