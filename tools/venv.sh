# Sourced by quickstart.sh and test.sh: make .venv and install the project into it, once.
# usage: make_venv [EXTRAS], for example: make_venv '[test]'

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '== %s\n' "$*"; }

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    say "Python 3.11 or later is needed, and none was found on PATH" >&2
    return 2
}

make_venv() {
    local extras="${1:-}" python stamp wanted
    stamp=".venv/.installed${extras//[^a-z]/}"
    wanted="$(cat pyproject.toml constraints.txt | cksum) $PWD"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        say ".venv is up to date"
    else
        python="$(find_python)"
        say "making .venv with $("$python" --version)"
        "$python" -m venv .venv
        say "installing torch (the largest part), then everything else"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
        echo "$wanted" >"$stamp"
    fi
    # Jobs call torchrun by name.
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}
