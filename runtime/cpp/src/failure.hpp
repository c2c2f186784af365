// Inside the library an Error travels as an exception, so that code reads like Python's; `guard` turns it into a Result at the
// edge.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "sana/error.hpp"

namespace sana {

class Failure : public std::exception {
  public:
    Failure(ErrorKind kind, std::string message) : error_{kind, std::move(message)} {}
    const Error& error() const { return error_; }
    const char* what() const noexcept override { return error_.message.c_str(); }

  private:
    Error error_;
};

template <class Work>
auto guard(Work work) -> Result<decltype(work())> {
    try {
        return work();
    } catch (const Failure& failure) {
        return failure.error();
    } catch (const std::bad_alloc&) {
        return Error{ErrorKind::kSana, "out of memory. Draw a smaller picture, or free some memory."};
    } catch (const std::exception& error) {
        return Error{ErrorKind::kSana, std::string("internal error (") + error.what() + "). Please report it."};
    }
}

}  // namespace sana
