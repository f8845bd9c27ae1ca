#!/bin/sh
# Make .venv from uv.lock with what this machine has; return at once when it is already made.
#
# Looks for uv (on the PATH, else a pinned one in .uv/) and for Python 3.12 or 3.13 (uv's own
# search, else pyenv versions that are not active, else a download by uv). The default python3
# is only used to install uv and may be older. stdout stays empty: `make run` prints records there.
#
#   .ci/env.sh        make or refresh .venv
#   .ci/env.sh uv     print the path of the uv that it uses
#
# UV_PYTHON names an interpreter; UV_PYTHON_DOWNLOADS=never keeps uv from downloading one.
set -eu

UV_PINNED=0.13.9
UV_OLDEST_MINOR=5 # 0.5 is the oldest release line that syncs this lock; older ones are not used
PYENV_VERSIONS="${PYENV_ROOT:-$HOME/.pyenv}/versions"

cd "$(dirname "$0")/.."
stamp=.venv/.kvpipe-synced
want="$(cat pyproject.toml uv.lock | cksum) ${UV_PYTHON:-}
$PWD"

say() { printf '%s\n' "$*" >&2; }

give_up() {
    say "kvpipe set-up: $1"
    shift
    for line in "$@"; do say "  $line"; done
    exit 1
}

usable_uv() {
    version=$("$1" --version 2>/dev/null) || return 1 # a pyenv shim exists and still fails
    version=${version#uv }
    minor=${version#*.}
    minor=${minor%%.*}
    case $version in
        0.*) [ "$minor" -ge "$UV_OLDEST_MINOR" ] 2>/dev/null ;;
        [1-9]*) true ;;
        *) false ;;
    esac
}

# Install uv into .uv/ with one Python: as a virtual environment, or with its pip alone, since
# Debian ships Python without ensurepip.
install_uv_with() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || return 1
    rm -rf .uv
    if "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        has_installer=yes
        "$1" -m venv .uv >&2 &&
            .uv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_PINNED" >&2
    elif "$1" -m pip --version >/dev/null 2>&1; then
        has_installer=yes
        "$1" -m pip install --quiet --disable-pip-version-check --target .uv "uv==$UV_PINNED" >&2
    else
        return 1
    fi
}

find_uv() {
    for uv in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" .uv/bin/uv; do
        if usable_uv "$uv"; then return; fi
    done
    has_installer=no
    for python in python3 /usr/bin/python3 "$PYENV_VERSIONS"/3.1[0-9]*/bin/python; do
        command -v "$python" >/dev/null || continue
        say "kvpipe set-up: no uv here; installing uv $UV_PINNED into .uv/ with $python"
        if install_uv_with "$python"; then
            uv=.uv/bin/uv
            if usable_uv "$uv"; then return; fi
        fi
        rm -rf .uv
    done
    if [ "$has_installer" = yes ]; then
        give_up "uv could not be installed; pip's own message is above." \
            "Is a Python package index reachable from here? Or install uv yourself:" \
            "https://docs.astral.sh/uv/getting-started/installation/"
    fi
    give_up "there is no uv here, and no python3 that could install it (venv and pip are missing)." \
        "On Debian or Ubuntu: sudo apt install python3-venv" \
        "Or install uv: https://docs.astral.sh/uv/getting-started/installation/"
}

find_python() {
    if [ -n "${UV_PYTHON:-}" ]; then
        python=$UV_PYTHON
        return
    fi
    for minor in 3.12 3.13; do
        python=$("$uv" python find --system --no-project --no-python-downloads "$minor" 2>/dev/null) && return
        for python in "$PYENV_VERSIONS/$minor"*/bin/python; do
            if "$python" -c '' 2>/dev/null; then return; fi
        done
    done
    python=3.12
    say "kvpipe set-up: no Python 3.12 or 3.13 on this machine; uv downloads one"
    if ! "$uv" python install --no-config "$python" >&2; then
        give_up "Python 3.12 or 3.13 is needed, and uv could not download one (its message is above)." \
            "Install one (pyenv install 3.12, apt install python3.12, brew install python@3.12)" \
            "or name one that you have: UV_PYTHON=/path/to/python3.12 make run"
    fi
}

if [ "${1:-}" = uv ]; then
    find_uv
    echo "$uv"
    exit
fi

if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    exit 0
fi

# A .venv that was copied or moved here: its scripts still call the Python of the old place.
if [ -f "$stamp" ] && [ "$(tail -n 1 "$stamp")" != "$PWD" ]; then rm -rf .venv; fi

find_uv
find_python
"$uv" sync --frozen --quiet --python "$python" ||
    give_up "uv sync --frozen failed with Python $python; uv's own message is above."
# Only after a sync that went through, so that a broken one is tried again.
printf '%s\n' "$want" >"$stamp"
