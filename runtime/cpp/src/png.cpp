// PNG files, byte for byte those of runtime/png.py, and written as runtime/image.py writes them.
#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>

#include "each.hpp"
#include "failure.hpp"
#include "python_text.hpp"
#include "sana/engine.hpp"

namespace sana {
namespace {

constexpr int kLevel = 1, kStrategy = Z_RLE;  // of zlib, as runtime/png.py
constexpr int kStripeRows = 64;
constexpr std::uint8_t kUp = 2;  // filter type, PNG specification, section 9.2

using Bytes = std::vector<std::uint8_t>;

void put_32(Bytes& out, std::uint32_t value) {
    for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<std::uint8_t>(value >> shift));
}

void put(Bytes& out, std::string_view text) { out.insert(out.end(), text.begin(), text.end()); }

void put_chunk(Bytes& out, std::string_view kind, const Bytes& body) {
    put_32(out, static_cast<std::uint32_t>(body.size()));
    const std::size_t from = out.size();
    put(out, kind);
    out.insert(out.end(), body.begin(), body.end());
    put_32(out, static_cast<std::uint32_t>(crc32_z(0, out.data() + from, out.size() - from)));
}

// One stripe of rows as a part of a raw deflate stream that ends at a byte.
Bytes deflated(Bytes& filtered, bool last) {
    z_stream stream{};
    if (deflateInit2(&stream, kLevel, Z_DEFLATED, -MAX_WBITS, 8, kStrategy) != Z_OK) throw std::bad_alloc();
    const std::unique_ptr<z_stream, int (*)(z_stream*)> ended(&stream,
                                                              deflateEnd);  // also if there is no memory for what comes out
    Bytes out(deflateBound(&stream, static_cast<uLong>(filtered.size())) + 16);  // and an empty block
    stream.next_in = filtered.data();
    stream.avail_in = static_cast<uInt>(filtered.size());
    stream.next_out = out.data();
    stream.avail_out = static_cast<uInt>(out.size());
    deflate(&stream, Z_NO_FLUSH);
    deflate(&stream, last ? Z_FINISH : Z_FULL_FLUSH);
    out.resize(stream.total_out);
    return out;
}

struct Stripe {
    Bytes chunk;
    uLong checksum = 0;    // of the filtered bytes
    std::size_t size = 0;  // filtered bytes
};

Stripe stripe_from(const Image& image, int start) {
    const std::size_t row = static_cast<std::size_t>(image.width) * 3;
    const int end = std::min(start + kStripeRows, image.height);
    Bytes filtered((row + 1) * static_cast<std::size_t>(end - start));
    auto to = filtered.begin();
    for (int y = start; y < end; ++y) {
        const std::uint8_t* here = image.pixels.data() + static_cast<std::size_t>(y) * row;
        *to++ = kUp;
        to = y == 0 ? std::copy(here, here + row, to)
                    : std::transform(here, here + row, here - row, to,
                                     [](std::uint8_t a, std::uint8_t b) { return static_cast<std::uint8_t>(a - b); });
    }
    Stripe out{{}, adler32_z(1, filtered.data(), filtered.size()), filtered.size()};
    put_chunk(out.chunk, "IDAT", deflated(filtered, end == image.height));
    return out;
}

// The pixels as IDAT chunks: zlib's header, one for each stripe, and zlib's checksum.
void put_pixels(Bytes& out, const Image& image) {
    std::vector<Stripe> stripes(static_cast<std::size_t>((image.height + kStripeRows - 1) / kStripeRows));
    each(stripes.size(), picture_threads(),
         [&](std::size_t i) { stripes[i] = stripe_from(image, static_cast<int>(i) * kStripeRows); });
    put_chunk(out, "IDAT", {0x78, 0x01});
    uLong checksum = 1;
    for (const Stripe& stripe : stripes) {
        checksum = adler32_combine(checksum, stripe.checksum, static_cast<z_off_t>(stripe.size));
        out.insert(out.end(), stripe.chunk.begin(), stripe.chunk.end());
    }
    Bytes last;
    put_32(last, static_cast<std::uint32_t>(checksum));
    put_chunk(out, "IDAT", last);
}

std::string write_whole(const Bytes& data, const std::filesystem::path& path) {
    std::filesystem::path folder = path.parent_path();
    std::error_code error;
    if (!folder.empty()) std::filesystem::create_directories(folder, error);
    if (folder.empty()) folder = ".";
    char suffix[16];
    std::snprintf(suffix, sizeof suffix, ".%08x", std::random_device{}());
    const std::filesystem::path temporary = folder / ("." + path.filename().string() + suffix);
    const int file = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    bool fine = file >= 0;
    for (std::size_t at = 0; fine && at < data.size();) {
        const ssize_t written = ::write(file, data.data() + at, data.size() - at);
        fine = written > 0;
        at += fine ? static_cast<std::size_t>(written) : 0;
    }
    fine = fine && fsync(file) == 0;
    const int why = errno;
    if (file >= 0) close(file);
    if (fine && std::rename(temporary.c_str(), path.c_str()) == 0) return path.string();
    const int number = fine ? errno : why;
    if (file >= 0) unlink(temporary.c_str());
    const bool full = number == ENOSPC || number == EDQUOT;
    throw Failure(full ? ErrorKind::kDiskFull : ErrorKind::kSana,
                  full ? "disk full: expected room for a picture of " + std::to_string(data.size()) + " bytes at " +
                             folder.string() + ". Free some space, or choose another folder."
                       : "[Errno " + std::to_string(number) + "] " + std::strerror(number) + ": " + repr(path.string()));
}

}  // namespace

std::vector<std::uint8_t> png_bytes(const Image& image) {
    Bytes out;
    put(out, "\x89PNG\r\n\x1a\n");
    Bytes header;
    put_32(header, static_cast<std::uint32_t>(image.width));
    put_32(header, static_cast<std::uint32_t>(image.height));
    header.insert(header.end(), {8, 2, 0, 0, 0});  // bits a channel, RGB
    put_chunk(out, "IHDR", header);
    if (!image.info.empty()) {
        Bytes text;
        put(text, std::string_view("sana\0\0\0\0\0", 9));
        put(text, image.info);
        put_chunk(out, "iTXt", text);
    }
    put_pixels(out, image);
    put_chunk(out, "IEND", {});
    return out;
}

Result<std::string> save_png(const Image& image, const std::string& path) {
    return guard([&] {
        const std::filesystem::path to(path);
        std::string suffix = to.extension().string();
        std::transform(suffix.begin(), suffix.end(), suffix.begin(),
                       [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
        if (suffix != ".png") {
            throw Failure(ErrorKind::kRequest, "picture file: got " + repr(to.filename().string()) +
                                                   "; expected a name that ends in .png, which keeps pixels and metadata.");
        }
        return write_whole(png_bytes(image), to);
    });
}

}  // namespace sana
