#!/usr/bin/env bash
# The packages of this environment as wheels, for a GPU machine without a network that has torch: bash tests/wheels.sh DIR
# There: pip install --no-index --no-deps --find-links DIR -r DIR/list.txt
# Environment: PYTHON_VERSION of that machine (3.12).
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 1 ] || { echo "usage: bash tests/wheels.sh DIR" >&2; exit 2; }
pip=.venv/bin/pip
mkdir -p "$1"

# Torch and what comes with it is that machine's own; of the rest every version is the one that is tested here.
$pip freeze --exclude-editable | grep '==' \
    | grep -viE '^(torch|torchvision|triton|timm|nvidia|cuda|ruff|mypy|pre.commit)[^=]*==' >"$1/list.txt"
sdists="deepspeed antlr4-python3-runtime"  # in no index as wheels; of Python alone, once built (without isolation: torch)
for name in $sdists; do
    requirement=$(grep -iE "^$name==" "$1/list.txt" || true)
    if [ -n "$requirement" ]; then
        DS_BUILD_OPS=0 $pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$1" "$requirement"
    fi
done
grep -viE "^(${sdists// /|})==" "$1/list.txt" >"$1/download.txt"
$pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform linux_x86_64 \
    --dest "$1" -r "$1/download.txt"
rm "$1/download.txt"
du -sh "$1"
