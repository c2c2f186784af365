#include "queue.hpp"

namespace sana {

Failure closed_engine() { return {ErrorKind::kSana, "this SanaEngine is closed. Make another one."}; }

Queue::Turn Queue::wait(const std::stop_token& cancel) {
    std::unique_lock held(lock_);
    const auto me = std::this_thread::get_id();
    if (!line_.empty() && line_.front() == me) {
        throw Failure(ErrorKind::kSana,
                      "SanaEngine was called from its own on_step. Let the request end first, or use a second engine.");
    }
    if (closed_) throw closed_engine();
    const auto place = line_.insert(line_.end(), me);
    changed_.wait(held, cancel, [&] { return closed_ || place == line_.begin(); });
    const bool cancelled = cancel.stop_requested();
    if (cancelled || closed_) {
        line_.erase(place);
        changed_.notify_all();  // the next one, which may be the first now, and who closes
        throw cancelled ? Failure(ErrorKind::kCancelled, "cancelled before it began.") : closed_engine();
    }
    return Turn(*this);
}

void Queue::leave() {
    const std::lock_guard held(lock_);
    line_.pop_front();
    changed_.notify_all();
}

bool Queue::close() {
    std::unique_lock held(lock_);
    closed_ = true;
    changed_.notify_all();
    const auto me = std::this_thread::get_id();
    const auto mine = [&] { return !line_.empty() && line_.front() == me; };
    changed_.wait(held, [&] { return line_.empty() || mine(); });
    return line_.empty();
}

std::size_t Queue::length() const {
    const std::lock_guard held(lock_);
    return line_.size();
}

}  // namespace sana
