# Sourced by launch/quickstart.sh and tests/run.sh: makes .venv once, and again when pyproject.toml changes.
# Sets $python. make_environment EXTRA installs the project with that extra ("" for none).

make_environment() {
    local extra="$1" python3 stamp
    python3="${PYTHON:-python3}"
    if ! "$python3" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: expected Python 3.11 or newer as $python3, got $("$python3" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
        exit 2
    fi
    python="$PWD/.venv/bin/python"
    stamp="$extra $(cksum < pyproject.toml)"
    if [ -x "$python" ] && grep -qxF "$stamp" .venv/installed 2>/dev/null; then
        return
    fi
    echo "Installing into .venv (a few minutes and about 6 GB the first time) ..." >&2
    if [ ! -x "$python" ]; then
        "$python3" -m venv .venv || {
            echo "error: $python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
            exit 2
        }
    fi
    "$python" -m pip install --quiet --disable-pip-version-check --use-pep517 -e ".${extra:+[$extra]}"
    # The test extra holds all that the bare one does: either stamp then saves the next install.
    { echo "$stamp"; [ -z "$extra" ] || echo " $(cksum < pyproject.toml)"; } >> .venv/installed
}
