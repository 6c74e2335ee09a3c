// Guarded reads of mapped files. A page of a file that was cut short after it was mapped is not there any more: reading
// it raises SIGBUS, which ends the process. While a guard is on, such a read in a watched range of addresses finds zeros
// instead, and the range remembers that it did; what was read must then not be used (emr_hf/mapped_files.py).
//
// A SIGBUS at any other address goes to the handler that was there before.

#include <cstdint>

#ifdef _WIN32  // a mapped file cannot be cut short there

extern "C" {
void emr_guard_begin() {}
void emr_guard_end() {}
void *emr_watch(uintptr_t, uintptr_t) { return nullptr; }
int64_t emr_hits(const void *) { return 0; }
int64_t emr_all_hits() { return 0; }
void emr_unwatch(void *) {}
}

#else

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <new>
#include <sys/mman.h>
#include <unistd.h>

namespace {

// Ranges are never freed, since the handler may be looking at them, but used again. An empty one has `stop` 0.
struct Range {
    std::atomic<uintptr_t> start{0}, stop{0};
    std::atomic<int64_t> hits{0};
    Range *next = nullptr;         // in the list of all of them
    Range *next_unused = nullptr;  // in that of those to be used again
};

std::atomic<Range *> ranges{nullptr};
Range *unused = nullptr;
std::atomic<int64_t> guards{0}, all_hits{0};
std::atomic_flag busy = ATOMIC_FLAG_INIT;  // guards all but what the handler reads
struct sigaction previous;
uintptr_t page_size = 4096;

struct Busy {
    Busy() {
        while (busy.test_and_set(std::memory_order_acquire)) {}
    }
    ~Busy() { busy.clear(std::memory_order_release); }
};

// Put zeros from the page of `address` to the end of its range: of a file that ends before a page, none is left after.
bool fill(uintptr_t address) {
    for (Range *range = ranges.load(std::memory_order_acquire); range; range = range->next) {
        const uintptr_t stop = range->stop.load(), start = range->start.load();
        if (address < start || address >= stop || stop != range->stop.load()) continue;
        const uintptr_t page = address & ~(page_size - 1), end = (stop + page_size - 1) & ~(page_size - 1);
        void *zeros = mmap((void *)page, end - page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (zeros == MAP_FAILED) return false;
        range->hits++;
        all_hits++;
        return true;
    }
    return false;
}

void pass_on(int number, siginfo_t *info, void *context) {
    if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(number, info, context);
    if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(number);
    const bool sent = info->si_code <= 0;  // by a process: else the read that failed is tried again, and fails again
    if (sent && previous.sa_handler == SIG_IGN) return;
    signal(number, SIG_DFL);
    if (sent) raise(number);
}

void handle(int number, siginfo_t *info, void *context) {
    const int error = errno;
    const bool filled = guards.load() > 0 && info->si_code > 0 && fill((uintptr_t)info->si_addr);
    errno = error;
    if (!filled) pass_on(number, info, context);
}

bool is_ours(const struct sigaction &action) {
    return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == handle;
}

}  // namespace

extern "C" {

// Guards may be nested, and be on in several threads: they are for the whole process.
void emr_guard_begin() {
    Busy lock;
    if (guards++ > 0) return;
    struct sigaction current, ours = {};
    if (sigaction(SIGBUS, nullptr, &current) != 0 || is_ours(current)) return;
    page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
    previous = current;
    ours.sa_sigaction = handle;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, nullptr);
}

// Where another handler has been put on top of ours, that one stays, and ours passes on whatever it is given.
void emr_guard_end() {
    Busy lock;
    if (--guards > 0) return;
    struct sigaction current;
    if (sigaction(SIGBUS, nullptr, &current) == 0 && is_ours(current)) sigaction(SIGBUS, &previous, nullptr);
}

// Watch some bytes until `emr_unwatch`, before they are unmapped. Null where there is no memory.
void *emr_watch(uintptr_t start, uintptr_t length) {
    Busy lock;
    Range *range = unused;
    if (range) {
        unused = range->next_unused;
    } else {
        void *place = malloc(sizeof(Range));
        if (!place) return nullptr;
        range = new (place) Range;
        range->next = ranges.load();
        ranges.store(range, std::memory_order_release);
    }
    range->hits = 0;
    range->start = start;
    range->stop = start + length;
    return range;
}

// How often zeros were put in the place of a watched range's pages.
int64_t emr_hits(const void *range) { return ((const Range *)range)->hits.load(); }

// The same of all ranges that there ever were.
int64_t emr_all_hits() { return all_hits.load(); }

void emr_unwatch(void *given) {
    Busy lock;
    Range *range = (Range *)given;
    range->stop = 0;
    range->next_unused = unused;
    unused = range;
}

}  // extern "C"

#endif
