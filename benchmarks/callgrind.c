/* What a program can ask of callgrind while it runs: see benchmarks/callgrind.py. */
#include <valgrind/callgrind.h>

void clevagent_start(void) { CALLGRIND_START_INSTRUMENTATION; }
void clevagent_zero(void) { CALLGRIND_ZERO_STATS; }
void clevagent_dump(const char *label) { CALLGRIND_DUMP_STATS_AT(label); }
