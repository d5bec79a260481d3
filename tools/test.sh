#!/usr/bin/env bash
# Install and run the whole test suite on two cores; arguments go to pytest: tools/test.sh tests/gates -k comet
set -euo pipefail
. "$(dirname "$0")/venv.sh"

make_venv '[test]'
say "running the tests"
# A file's tests stay in one process: they share what is dear to make. More processes than cores let deadlines pass.
exec python -m pytest -n 2 --dist loadfile "$@"
