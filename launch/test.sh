#!/usr/bin/env bash
# Every check of this repository: style, types, tests against real servers. No GPU needed.
#   bash launch/test.sh              everything
#   bash launch/test.sh tests/ops    what you name, passed to pytest
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

if [ $# -gt 0 ]; then exec "$PYTHON" -m pytest "$@"; fi

# Two at a time: a server's start is mostly imports on one core. Waiting threads must not spin then.
export OMP_WAIT_POLICY=passive
failed=()
step() {
  printf '\n\033[1m== %s\033[0m\n' "$1"
  shift
  "$@" || failed+=("$*")
}

step "style" "$PYTHON" -m ruff check .
step "format" "$PYTHON" -m ruff format --check .
step "types" "$PYTHON" -m mypy
# The one test that holds step times against each other has the machine to itself.
alone=tests/server/test_slo_target.py
step "tests" "$PYTHON" -m pytest tests -n 3 --durations=8 --ignore=$alone
step "time per output token" "$PYTHON" -m pytest $alone
step "kernels compile" bash launch/compile_check.sh

if [ ${#failed[@]} -gt 0 ]; then
  printf '\n\033[1;31mFAILED:\033[0m %s\n' "${failed[@]}"
  exit 1
fi
printf '\n\033[1;32mall checks passed\033[0m\n'
