/* Preloaded into a process, it makes the wall clock say another time: the true one plus the seconds in the file
   that SHIFTED_CLOCK names, which may change while the process runs. The monotonic clocks stay as they are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define TRUE_ONE(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define EPOCH_SECONDS 1000000000 /* a deadline of at least this many seconds is one of the wall clock */

static long shift(void) {
    const char *name = getenv("SHIFTED_CLOCK");
    char text[32] = {0};
    int descriptor = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    if (descriptor < 0) return 0;
    if (read(descriptor, text, sizeof text - 1) < 0) text[0] = 0;
    close(descriptor);
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int code = TRUE_ONE(clock_gettime)(clock, now);
    if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}

/* The kernel waits by the true clock. */
static struct timespec truly(const struct timespec *until) {
    struct timespec found = *until;
    if (found.tv_sec >= EPOCH_SECONDS) found.tv_sec -= shift();
    return found;
}

int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *until) {
    struct timespec found = truly(until);
    return TRUE_ONE(pthread_cond_timedwait)(c, m, &found);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    struct timespec found = truly(until);
    return TRUE_ONE(sem_timedwait)(semaphore, &found);
}
