#!/bin/sh
# See to valgrind, its headers and a C compiler, for `make bench-instructions`.
set -eu

is_complete() {
    command -v valgrind >/dev/null 2>&1 && command -v cc >/dev/null 2>&1 &&
        echo '#include <valgrind/callgrind.h>' | cc -fsyntax-only -x c - 2>/dev/null
}

if ! is_complete; then
    # On Debian the headers are part of valgrind.
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
        apt-get update -qq && apt-get install -y -qq valgrind gcc libc6-dev
    fi
fi
if ! is_complete; then
    echo "Counting instructions takes valgrind with its headers and a C compiler. Install them (on Debian: apt-get install valgrind gcc libc6-dev) and run make again." >&2
    exit 1
fi
