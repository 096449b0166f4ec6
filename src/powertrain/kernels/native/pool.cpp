#include "pool.hpp"

#include <algorithm>

namespace powertrain {
namespace {

// A waiting thread spins about as long as a wake-up takes (some 50 microseconds), then sleeps. Longer would pay only
// where nobody else wants the core, and cost a whole time slice where the one that is waited for has been pushed off it.
constexpr int SPINS = 2000;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void wait_while(std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < SPINS; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        relax();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int num_threads) : size_(num_threads) {
    for (int thread = 1; thread < size_; ++thread) threads_.emplace_back([this, thread] { work(thread); });
}

Team::~Team() {
    stops_ = true;
    ticket_.fetch_add(1, std::memory_order_release);
    ticket_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Team::run(Work work, const void* context) {
    std::lock_guard lock(caller_);
    work_ = work;
    context_ = context;
    position_.store(0, std::memory_order_relaxed);
    if (size_ > 1) {
        ticket_.fetch_add(1, std::memory_order_release);
        ticket_.notify_all();
    }
    work(context, 0);
    barrier();
}

void Team::work(int thread) {
    uint32_t ticket = 0;
    for (;;) {
        wait_while(ticket_, ticket);
        ++ticket;  // one job at a time: the count can only be one ahead
        if (stops_) return;
        work_(context_, thread);
        barrier();
    }
}

bool Team::next(int64_t count, int64_t grain, int64_t& begin, int64_t& end) {
    begin = position_.load(std::memory_order_relaxed);
    do {
        if (begin >= count) return false;
        end = begin + std::max(grain, (count - begin) / (2 * size_));
        if (size_ == 1 || end > count) end = count;
    } while (!position_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
}

int64_t Team::take(int64_t count) {
    const int64_t i = position_.fetch_add(1, std::memory_order_relaxed);
    return i < count ? i : -1;
}

void Team::barrier() {
    if (size_ == 1) {
        position_.store(0, std::memory_order_relaxed);
        return;
    }
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
        arrived_.store(0, std::memory_order_relaxed);
        position_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    } else {
        wait_while(phase_, phase);
    }
}

}  // namespace powertrain
