#!/usr/bin/env bash
# Install and run the whole test suite; arguments go to pytest: tools/test.sh tests/gates -k comet
set -euo pipefail
. "$(dirname "$0")/venv.sh"

make_venv '[test]'
say "running the tests"
exec python -m pytest "$@"
