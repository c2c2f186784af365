// Who draws next: requests in the order in which they came, one at a time.
#pragma once

#include <condition_variable>
#include <list>
#include <mutex>
#include <stop_token>
#include <thread>

#include "failure.hpp"

namespace sana {

Failure closed_engine();  // "this SanaEngine is closed"

class Queue {
  public:
    // Lets the next one in when it goes.
    class Turn {
      public:
        explicit Turn(Queue& queue) : queue_(queue) {}
        Turn(const Turn&) = delete;
        ~Turn() { queue_.leave(); }

      private:
        Queue& queue_;
    };

    // Returns when all that came before are done. Raises Cancelled as soon as `cancel` is requested, and SanaError if the queue is
    // closed, or if this thread has the turn already, which would wait for itself.
    [[nodiscard]] Turn wait(const std::stop_token& cancel);

    // Nobody else gets in: who waits is refused. Returns when the turn in progress is over, but for its own thread at once.
    // True where no turn is in progress any more.
    bool close();

    std::size_t length() const;  // how many wait or work

  private:
    void leave();

    mutable std::mutex lock_;
    std::condition_variable_any changed_;
    std::list<std::thread::id> line_;  // the first one has the turn
    bool closed_ = false;
};

}  // namespace sana
