#!/bin/sh
# Create or update .venv, the one environment of this repository: the package, editable, with all its extras.
# PYTHON=/path/to/python chooses the interpreter; nothing outside .venv is used or changed, apart from the Debian
# package python3-venv, which is installed where Python came without it and we may.
set -eu
cd "$(dirname "$0")/.."

runs() { "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; }
complete() { "$1" -c "import venv, ensurepip" >/dev/null 2>&1; }

# Where a new environment's Python comes from: 3.12 and 3.11 first, because PyTorch3D's wheels exist for those.
candidates() {
    if [ -n "${PYTHON:-}" ]; then command -v "$PYTHON" || echo "$PYTHON"; return; fi
    for name in python3.12 python3.11 python3 python3.13 python3.14; do
        for dir in $(echo "$PATH" | tr ' :' '?\n') /usr/bin; do ls -d $dir/$name 2>/dev/null || true; done
    done
}

pick() {
    candidates | while IFS= read -r python; do
        if runs "$python" && "$1" "$python"; then echo "$python"; break; fi
    done
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif sudo -n true 2>/dev/null; then sudo -n "$@"; else return 1; fi
}

if ! { [ -x .venv/bin/python ] && runs .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    python=$(pick complete)
    if [ -z "$python" ]; then
        python=$(pick runs)
        if [ -z "$python" ]; then
            echo "No working Python 3.11 or newer was found${PYTHON:+ at PYTHON=$PYTHON}. On Debian or Ubuntu: sudo apt-get install python3 python3-venv" >&2
            echo "If yours lies elsewhere: make PYTHON=/path/to/python" >&2
            exit 1
        fi
        package=$("$python" -c "import sys; print('python%d.%d-venv' % sys.version_info[:2])")
        echo "$python has no ensurepip; installing the Debian package $package"
        if ! { as_root apt-get update && as_root apt-get install -y "$package"; } || ! complete "$python"; then
            echo "$python cannot create a virtual environment. Please run: sudo apt-get install $package" >&2
            exit 1
        fi
    fi
    echo "Creating .venv with $python ($("$python" --version))"
    "$python" -m venv --clear .venv
fi

echo "Installing the package and its extras into .venv (about 7 GB, several minutes on first use)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs,pytorch3d,build-head,dlib]'
.venv/bin/python -m pip check --disable-pip-version-check || echo "pip finds the environment inconsistent (above); going on" >&2
touch .venv/.ready
