/* Kills the process group at the N-th call that changes a file: put under the C library's functions by LD_PRELOAD.
 *
 * Of a write, half is written before. The counter is shared with child processes, so that a kill may meet any of them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static volatile long *shared; /* armed, counted, the call to die at */

__attribute__((constructor)) static void begin(void) {
    void *memory = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared = memory == MAP_FAILED ? 0 : memory;
}

void kills_arm(long target) { shared[1] = 0, shared[2] = target, shared[0] = 1; }
long kills_counted(void) { return shared[1]; }

static int due(void) { return shared && shared[0] && __sync_add_and_fetch(&shared[1], 1) == shared[2]; }

static void die(void) {
    kill(0, SIGKILL);
    for (;;) pause();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(result, name, parameters, arguments) \
    result name parameters {                      \
        if (due()) die();                         \
        return REAL(name) arguments;              \
    }

WRAP(int, rename, (const char *a, const char *b), (a, b))
WRAP(int, renameat, (int x, const char *a, int y, const char *b), (x, a, y, b))
WRAP(int, renameat2, (int x, const char *a, int y, const char *b, unsigned f), (x, a, y, b, f))
WRAP(int, link, (const char *a, const char *b), (a, b))
WRAP(int, linkat, (int x, const char *a, int y, const char *b, int f), (x, a, y, b, f))
WRAP(int, symlink, (const char *a, const char *b), (a, b))
WRAP(int, mkdir, (const char *a, mode_t m), (a, m))
WRAP(int, mkdirat, (int x, const char *a, mode_t m), (x, a, m))
WRAP(int, rmdir, (const char *a), (a))
WRAP(int, unlink, (const char *a), (a))
WRAP(int, unlinkat, (int x, const char *a, int f), (x, a, f))
WRAP(int, chmod, (const char *a, mode_t m), (a, m))
WRAP(int, fchmod, (int d, mode_t m), (d, m))
WRAP(int, fsync, (int d), (d))
WRAP(int, fdatasync, (int d), (d))
WRAP(int, ftruncate, (int d, off_t n), (d, n))
WRAP(int, ftruncate64, (int d, off64_t n), (d, n))

ssize_t write(int d, const void *bytes, size_t n) {
    if (d > 2 && due()) {
        if (n > 1) (void)!REAL(write)(d, bytes, n / 2);
        die();
    }
    return REAL(write)(d, bytes, n);
}

ssize_t pwrite64(int d, const void *bytes, size_t n, off64_t at) {
    if (due()) {
        if (n > 1) (void)!REAL(pwrite64)(d, bytes, n / 2, at);
        die();
    }
    return REAL(pwrite64)(d, bytes, n, at);
}

#define OPEN(name, parameters, arguments)         \
    int name parameters {                         \
        mode_t mode = 0;                          \
        if (flags & (O_CREAT | O_TMPFILE)) {      \
            va_list more;                         \
            va_start(more, flags);                \
            mode = va_arg(more, mode_t);          \
            va_end(more);                         \
            if (flags & O_CREAT && due()) die();  \
        }                                         \
        return REAL(name) arguments;              \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))
