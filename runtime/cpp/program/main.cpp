// The program `sana`: the commands of apps/cli that need no Python.
#include <iostream>
#include <string>
#include <vector>

#include "backend_choice.hpp"
#include "command.hpp"
#include "python_text.hpp"

int main(int argc, char** argv) {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    if (arguments.empty() || arguments[0] == "--help" || arguments[0] == "-h") {
        (arguments.empty() ? std::cerr : std::cout) << sana::program::kUsage;
        return arguments.empty() ? 2 : 0;
    }
    if (arguments[0] == "--version") {
        std::cout << "sana " << SANA_VERSION << " (libsana_runtime)\n" << sana::built_with() << "\n";
        return 0;
    }
    auto done = sana::guard([&] {
        const std::vector<std::string> rest(arguments.begin() + 1, arguments.end());
        if (arguments[0] == "generate") return sana::program::generate(rest);
        if (arguments[0] == "replay") return sana::program::replay(rest);
        throw sana::Failure(sana::ErrorKind::kSana, "unknown command " + sana::repr(arguments[0]) + "; " +
                                                        sana::nearest(arguments[0], {"generate", "replay"}) + ". Try: sana --help");
    });
    if (done) return *done;
    std::cerr << "sana: error: " << done.error().message << "\n";
    return 2;
}
