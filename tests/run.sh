#!/usr/bin/env bash
# Every test on a fresh machine: bash tests/run.sh [--system] [pytest arguments]
# With CI=true or --system, as root, Debian packages that tests need (Slurm, Chromium) are installed first.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

system="${CI:-false}"
if [ "${1:-}" = "--system" ]; then system=true; shift; fi
make_environment test
if [ "$system" = true ]; then bash tests/system.sh; fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two files at a time, 6 GB each, in the order of tests/conftest.py. By file, since tests share what a fixture of their
# file makes (loadgroup of xdist 3.8 does nothing in pytest 9.2). Not where a few are chosen, or their output is wanted.
workers=(-n 2 --dist loadfile --no-loadscope-reorder)
for argument in "$@"; do
    case "$argument" in tests/* | -s | -k) workers=() ;; esac
done
exec "$python" -m pytest "${workers[@]}" "$@"
