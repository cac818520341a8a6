/* A disk whose every flush takes OMNI_FLUSH_MS, as a cloud's volumes and disks that turn do: for LD_PRELOAD. Each flush
   is a line in OMNI_FLUSHES. Only for benchmarks: it changes nothing of what a flush does. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int slow(long call, int fd) {
    const char *ms = getenv("OMNI_FLUSH_MS"), *file = getenv("OMNI_FLUSHES");
    long length = ms ? atol(ms) : 0;
    struct timespec time = {length / 1000, length % 1000 * 1000000};
    nanosleep(&time, NULL);
    if (file) {
        int list = open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (list >= 0) {
            /* Whether it was written does not change what is measured. */
            (void)!write(list, "flush\n", 6);
            close(list);
        }
    }
    return (int)syscall(call, fd);
}

int fsync(int fd) { return slow(SYS_fsync, fd); }
int fdatasync(int fd) { return slow(SYS_fdatasync, fd); }
int syncfs(int fd) { return slow(SYS_syncfs, fd); }
