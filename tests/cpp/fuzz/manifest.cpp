// Any bytes as manifest.json, and as a picture's metadata: both come from files that others wrote.
#include "manifest.hpp"
#include "failure.hpp"
#include "fuzz.hpp"
#include "picture_info.hpp"
#include "unicode.hpp"

void fuzz_manifest(std::string_view data) {
    for (const bool manifest : {true, false}) {
        try {
            if (manifest) {
                for (const std::string& component : sana::parse_manifest(data, "manifest.json").components())
                    require(!sana::graph_name(component).empty());
            } else {  // what was read is written, and read again as the same
                const std::string text = sana::json_of(sana::parse_picture_info(data, "picture"));
                require(sana::json_of(sana::parse_picture_info(text, "picture")) == text);
            }
        } catch (const sana::Failure& failure) {
            require(!failure.error().message.empty());
        }
    }
}
