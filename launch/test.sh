#!/usr/bin/env bash
# Every check of this repository: style, types, tests against real servers. No GPU needed.
#   bash launch/test.sh              everything: 12 to 23 minutes on two cores
#   bash launch/test.sh --quick      what starts no SGLang: 2 to 3 minutes
#   bash launch/test.sh tests/ops    what you name, passed to pytest
source "$(dirname "${BASH_SOURCE[0]}")/_help.sh" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

quick=
if [ "${1:-}" = --quick ]; then
  quick=1
  shift
fi
if [ $# -gt 0 ]; then exec "$PYTHON" -m pytest "$@"; fi

# Several at a time: a server's start is mostly imports on one core. Waiting threads must not spin.
export OMP_WAIT_POLICY=passive
ran=()
failed=()
step() {
  printf '\n\033[1m== %s\033[0m\n' "$1"
  ran+=("$1")
  shift
  "$@" || failed+=("$*")
}
finish() {
  printf '\nran in %d min %d s: %s\n' $((SECONDS / 60)) $((SECONDS % 60)) \
    "$(printf '%s; ' "${ran[@]}" | sed 's/; $//')"
  if [ ${#failed[@]} -gt 0 ]; then
    printf '\033[1;31mFAILED:\033[0m %s\n' "${failed[@]}"
    exit 1
  fi
  printf '\033[1;32m%s\033[0m\n' "$1"
}

SECONDS=0
if [ -z "$quick" ]; then
  # Types are checked on one core: the other compiles meanwhile.
  compiled=$(mktemp)
  bash launch/compile_check.sh >"$compiled" 2>&1 &
  compiling=$!
  trap 'kill "$compiling" 2>/dev/null || true; rm -f "$compiled"' EXIT
  result_of() { # the command that runs
    wait "$compiling"
    local status=$?
    cat "$compiled"
    rm -f "$compiled"
    trap - EXIT # a process of that number may be another's by then
    return "$status"
  }
fi
step "style" "$PYTHON" -m ruff check .
step "format" "$PYTHON" -m ruff format --check .
step "types" "$PYTHON" -m mypy
if [ -n "$quick" ]; then
  step "tests of all parts but the server" "$PYTHON" -m pytest \
    tests/{ops,cpu,schedule,runtime,profile,calibration,cli,measure,patches,packaging,fuzz} \
    -n 2 --durations=5 \
    --ignore=tests/calibration/test_calibrate.py --ignore=tests/calibration/test_layer_by_layer.py \
    --ignore=tests/patches/test_upstream.py --ignore=tests/packaging/test_wheel.py \
    --ignore=tests/ops/test_triton_interpreter.py
  finish "quick checks passed; not run: whatever starts SGLang, wheels, the upstream patch, Triton, benchmarks, soaks"
  exit
fi
step "kernels compile" result_of bash launch/compile_check.sh
# The one test that holds step times against each other has the machine to itself.
alone=tests/server/test_slo_target.py
# Each has servers of its own: 10 GiB at most with four, which keep two cores busy.
workers=$(awk '/MemAvailable/ { print ($2 > 14 * 1048576 ? 4 : 3) }' /proc/meminfo)
step "tests" "$PYTHON" -m pytest tests -n "$workers" --durations=8 --ignore=$alone
step "time per output token" "$PYTHON" -m pytest $alone
finish "all checks passed"
