#!/bin/sh
# Prints the path of a Python 3.12 that can make a virtual environment, or says in one line that there is none.
works() {
    [ -n "$1" ] && "$1" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null
}
for candidate in "$PYTHON_3_12" python3.12 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
    /opt/python/3.12*/bin/python3.12 /usr/local/bin/python3.12; do
    if works "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done
echo "error: Python 3.12 is needed and was not found; install it, or run: make PYTHON_3_12=/path/to/python3.12 setup" >&2
exit 1
