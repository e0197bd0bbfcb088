/* A disk that is full from some call on, for one process: preloaded, it lets calls that write below FAULT_UNDER fail.

   FAULT_UNDER  folders, with ':' between them
   FAULT_LOG    a file that gets a line "OP PATH" for each such call
   FAULT_OP, FAULT_PATH  from the first call of this kind whose path is of this pattern, all of them fail with ENOSPC

   cc -shared -fPIC -o full_disk.so full_disk.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static int full = 0;

static int is_below(const char *path) {
    const char *under = getenv("FAULT_UNDER");
    while (under && *under) {
        const char *end = strchr(under, ':');
        size_t size = end ? (size_t)(end - under) : strlen(under);
        if (size && strncmp(path, under, size) == 0) return 1;
        under = end ? end + 1 : NULL;
    }
    return 0;
}

/* Whether this call is to fail. Raw system calls inside, or it would meet itself. */
static int fails(const char *op, const char *path) {
    if (!path || !is_below(path)) return 0;
    const char *log = getenv("FAULT_LOG");
    if (log) {
        char line[PATH_MAX + 32];
        int size = snprintf(line, sizeof line, "%s %s\n", op, path);
        int fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0644);
        if (fd >= 0) { syscall(SYS_write, fd, line, size); syscall(SYS_close, fd); }
    }
    const char *want = getenv("FAULT_OP"), *pattern = getenv("FAULT_PATH");
    if (want && pattern && strcmp(op, want) == 0 && fnmatch(pattern, path, 0) == 0) full = 1;
    if (full) errno = ENOSPC;
    return full;
}

static int fails_fd(const char *op, int fd) {
    char name[64], path[PATH_MAX];
    if (!getenv("FAULT_UNDER")) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, name, path, sizeof path - 1);
    if (size <= 0) return 0;
    path[size] = 0;
    return fails(op, path);
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

#define OPENS(name)                                                        \
    int name(const char *path, int flags, ...) {                           \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        if ((flags & O_CREAT) && fails("create", path)) return -1;         \
        return REAL(name)(path, flags, mode);                              \
    }
OPENS(open)
OPENS(open64)
#define OPENATS(name)                                                      \
    int name(int at, const char *path, int flags, ...) {                   \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        if ((flags & O_CREAT) && fails("create", path)) return -1;         \
        return REAL(name)(at, path, flags, mode);                          \
    }
OPENATS(openat)
OPENATS(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    return fails_fd("write", fd) ? -1 : REAL(write)(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return fails_fd("write", fd) ? -1 : REAL(writev)(fd, parts, count);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return fails_fd("write", fd) ? -1 : REAL(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return fails_fd("write", fd) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
int ftruncate(int fd, off_t size) { return fails_fd("truncate", fd) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return fails_fd("truncate", fd) ? -1 : REAL(ftruncate64)(fd, size); }
int posix_fallocate(int fd, off_t at, off_t size) {
    return fails_fd("truncate", fd) ? ENOSPC : REAL(posix_fallocate)(fd, at, size);
}
int fsync(int fd) { return fails_fd("fsync", fd) ? -1 : REAL(fsync)(fd); }
int mkdir(const char *path, mode_t mode) { return fails("mkdir", path) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return fails("rename", to) ? -1 : REAL(rename)(from, to); }
int link(const char *from, const char *to) { return fails("link", to) ? -1 : REAL(link)(from, to); }
int symlink(const char *target, const char *path) { return fails("link", path) ? -1 : REAL(symlink)(target, path); }
