// Any bytes as a PNG. Its checksums are made right first, for nearly no change of a file would get past them.
#include <zlib.h>

#include <string>

#include "failure.hpp"
#include "fuzz.hpp"
#include "png_reader.hpp"

namespace {

void correct_checksums(std::string& data) {
    for (std::size_t at = 8; data.size() >= at + 12;) {
        std::size_t size = 0;
        for (std::size_t i = 0; i < 4; ++i) size = size << 8 | static_cast<unsigned char>(data[at + i]);
        if (size > data.size() - at - 12) return;
        const auto sum = crc32_z(0, reinterpret_cast<const unsigned char*>(data.data()) + at + 4, size + 4);
        for (std::size_t i = 0; i < 4; ++i) data[at + 8 + size + i] = static_cast<char>(sum >> (24 - 8 * i));
        at += size + 12;
    }
}

}  // namespace

void fuzz_png(std::string_view data) {
    std::string file(data);
    if (!file.empty() && file.back() != '!') correct_checksums(file);  // some files keep theirs
    try {
        const sana::Image image = sana::decode_png(file, "picture.png");
        require(image.pixels.size() == static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.height) * 3);
        require(sana::png_info(file, "picture.png") == image.info);
        const std::vector<std::uint8_t> again = sana::png_bytes(image);  // which says the same
        const std::string_view bytes(reinterpret_cast<const char*>(again.data()), again.size());
        require(sana::decode_png(bytes, "picture.png").pixels == image.pixels);
    } catch (const sana::Failure& failure) {
        require(!failure.error().message.empty());
    }
}
