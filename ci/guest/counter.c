/* Prints how fast this machine's time stamp counter runs, in kHz, by a clock that is right. Of many looks at both
 * the one counts that nothing came between. */
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

struct look {
    double ns;
    unsigned long long ticks;
};

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC_RAW, &time);
    return time.tv_sec * 1e9 + time.tv_nsec;
}

static struct look look(void)
{
    struct look best = {0, 0};
    double shortest = 1e18;
    for (int i = 0; i < 1000; i++) {
        double before = now();
        unsigned long long ticks = __rdtsc();
        double after = now();
        if (after - before < shortest) {
            shortest = after - before;
            best = (struct look){(before + after) / 2, ticks};
        }
    }
    return best;
}

int main(void)
{
    struct timespec nap = {0, 100000000};
    struct look begin = look();
    nanosleep(&nap, NULL);
    struct look end = look();
    printf("%.0f\n", (end.ticks - begin.ticks) / (end.ns - begin.ns) * 1e6);
    return 0;
}
