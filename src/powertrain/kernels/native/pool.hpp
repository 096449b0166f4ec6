// One team of threads. Everybody runs the same function; inside it they share loops and meet at barriers.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace powertrain {

class Team {
public:
    using Work = void (*)(const void* context, int thread);

    explicit Team(int num_threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Runs `work` once on every thread, the caller's included, and returns when all are done. One caller at a time.
    void run(Work work, const void* context);

    // The next share of a loop over [0, count): half of an equal share of what is left, at least `grain`. False at the
    // end. Which thread takes what differs from run to run, so an iteration must not depend on its neighbours.
    bool next(int64_t count, int64_t grain, int64_t& begin, int64_t& end);

    // One iteration at a time, for pieces of unequal size; -1 at the end.
    int64_t take(int64_t count);

    // All threads meet here; the shared loop starts again at 0.
    void barrier();

private:
    void work(int thread);

    const int size_;
    std::mutex caller_;
    std::vector<std::thread> threads_;
    Work work_ = nullptr;
    const void* context_ = nullptr;
    bool stops_ = false;
    alignas(64) std::atomic<uint32_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int64_t> position_{0};
};

}  // namespace powertrain
