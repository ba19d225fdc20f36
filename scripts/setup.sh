#!/bin/sh
# Makes .venv and installs everything into it; does nothing when that is done already.
# PYTHON in the environment chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

if [ -x .venv/bin/python ] &&
    .venv/bin/python -I -S scripts/setup_stamp.py --is-current "${PYTHON:-}" 2>/dev/null; then
    exit 0
fi

suits() {
    "$1" -I -S -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

chosen=
if [ -n "${PYTHON:-}" ]; then
    if suits "$PYTHON"; then
        chosen=$PYTHON
    else
        echo "setup: PYTHON=$PYTHON is no Python of 3.11 to 3.14; choose another" >&2
        exit 1
    fi
else
    for candidate in python3.13 python3.12 python3.11 python3 python3.14; do
        if suits "$candidate"; then
            chosen=$candidate
            break
        fi
    done
fi
if [ -z "$chosen" ]; then
    found=$(python3 --version 2>/dev/null || echo "no python3 at all")
    echo "setup: Baton needs Python 3.11 to 3.14, and there is $found; install one" \
        "(apt-get install python3.11 python3.11-venv), or name one with PYTHON=…" >&2
    exit 1
fi

exec "$chosen" -I scripts/setup_env.py
