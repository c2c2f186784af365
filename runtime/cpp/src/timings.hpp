// What a start's time and memory go to, on stderr: `sana generate --timings`. Nothing is said until a program asks for it.
#pragma once

#include <string>

namespace sana::timings {

void begin();           // seconds count from now
void start_is_over();   // from now on tell_part says nothing, so that it costs later pictures nothing
void tell(const char* what);                // "sana: WHAT after 0.123456 s"
void tell_part(const std::string& what);    // so too, of a part of the start; from any thread
void tell_memory(const char* when);         // "sana: memory, WHEN: …", of this process, in MB of 1e6 bytes

}  // namespace sana::timings
