#!/usr/bin/env bash
# Everything about the GPU in one command, on a bare machine: an NVIDIA GPU, nvcc, Python with torch,
# triton and pytest. No network; nothing is installed into that Python.
#   bash launch/gpu_check.sh            builds, tests, checks, measures; at most 9 minutes
#   bash launch/gpu_check.sh --quick    fewer sizes
#   bash launch/gpu_check.sh --server   instead: proves a real SGLang server, in an environment that has
#                                       SGLang 0.5.23; steps of at most 10 minutes, 30 in all, each kept
#                                       (launch/gpu_server.py says which; further arguments go to it)
# Writes op.json, rules.json, layer.json and gpu_check.log to ${OUT:-benchmarks/results/<hardware>}. Wheels in
# .whl/ (bash launch/gpu_wheels.sh, where there is a network) are used from a throwaway folder:
# without tvm-ffi there are no CUDA kernels, without SGLang the layer benchmark uses a GEMM of its own.
# A part that fails does not stop the others; the exit status says whether any did.
source "$(dirname "${BASH_SOURCE[0]}")/_help.sh" "$@"
case "${1:-}" in
  "" | --quick | --server) ;;
  *) echo "gpu_check.sh: what is $1? see --help" >&2; exit 2 ;;
esac
if [ $# -gt 1 ] && [ "$1" != --server ]; then
  echo "gpu_check.sh: what is $2? see --help" >&2
  exit 2
fi
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON="${SERE_PYTHON:-python3}"
LIMIT_S="${SERE_GPU_CHECK_LIMIT_S:-540}"
TABLES_S=10 # kept back for the end
SECONDS=0
started=$(date +%s)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Compilers that others start look for CUDA themselves, and not all as we do.
if [ -z "${CUDA_HOME:-}" ] && [ -x /usr/local/cuda/bin/nvcc ]; then export CUDA_HOME=/usr/local/cuda; fi
if [ -n "${CUDA_HOME:-}" ]; then PATH="$CUDA_HOME/bin:$PATH"; fi
if [ "$PYTHON" != "${PYTHON##*/}" ]; then PATH="${PYTHON%/*}:$PATH"; fi # ninja may lie beside it
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
quick=()
if [ "${1:-}" = --quick ]; then quick=(--quick); fi

failed=()
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
fail() { failed+=("$1"); printf '\033[1;31mFAILED\033[0m %s\n' "$1"; }

# Runs a command for at most so many seconds, and never beyond the whole check's limit.
part() { # name, seconds, command
  local name="$1" limit="$2" left=$((LIMIT_S - TABLES_S - SECONDS)) began=$SECONDS status
  shift 2
  say "$name"
  if [ "$left" -lt 5 ]; then fail "$name: no time left"; return 1; fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  timeout -k 5 "$limit" "$@" </dev/null
  status=$?
  echo "($((SECONDS - began)) s)"
  case $status in
    0) return 0 ;;
    124 | 137) fail "$name: stopped after $limit s" ;;
    *) fail "$name: exit status $status" ;;
  esac
  return 1
}

use_wheels() {
  local wheels=(.whl/*.whl) site="$scratch/site" wheel
  if [ ! -e "${wheels[0]}" ]; then
    echo "no wheels in .whl/: only what $PYTHON has"
    return 0
  fi
  say "wheels in .whl/"
  if ! "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check --root-user-action=ignore --target "$site" "${wheels[@]}"; then
    echo "pip cannot install all of them at once; unpacking one by one"
    rm -rf "$site"
    for wheel in "${wheels[@]}"; do
      "$PYTHON" -m zipfile -e "$wheel" "$site" || fail "wheel $(basename "$wheel")"
    done
  fi
  export PYTHONPATH="$PYTHONPATH:$site"
  echo "${#wheels[@]} wheels, $SECONDS s"
}

# Memory errors, races for shared memory and barriers that not every thread reaches, in a small case.
# Some virtual machines do not let the tool at the GPU.
sanitize() { # seconds
  local check checks=(memcheck racecheck synccheck) running=() i status worst=0
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on this machine: skipped"
    return 0
  fi
  # All at once: most of each run is one core that loads libraries and compiles.
  for check in "${checks[@]}"; do
    sanitize_for "$check" "$1" >"$scratch/$check.txt" 2>&1 &
    running+=($!)
  done
  # Each has a group of its own, which an end from outside would leave to itself.
  trap 'kill "${running[@]}" 2>/dev/null; wait; exit 143' TERM
  for i in "${!checks[@]}"; do
    wait "${running[i]}"
    status=$?
    echo "-- ${checks[i]}"
    cat "$scratch/${checks[i]}.txt"
    if [ $status -ne 0 ]; then worst=$status; fi
  done
  trap - TERM
  return $worst
}

sanitize_for() { # memcheck | racecheck | synccheck, seconds
  local log="$scratch/$1.log" options=() status
  if [ "$1" = memcheck ]; then options=(--report-api-errors no); fi
  # Without torch's cache every tensor is an allocation, so that the tool sees its bounds. Calls that
  # fail are no finding: CUDA's own runtime asks the driver for functions that it may not have.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$2" compute-sanitizer --tool "$1" \
    --error-exitcode 99 ${options[@]+"${options[@]}"} "$PYTHON" -m launch.gpu_parts small-case >"$log" 2>&1 &
  trap "kill $! 2>/dev/null" TERM
  wait $!
  status=$?
  grep -m 40 '^=========' "$log" # the errors, the first ones first
  tail -n 12 "$log"
  if [[ $status -eq 124 || $status -eq 137 ]] &&
    ! grep -qE '^========= +(Invalid|Misaligned|Out|Barrier|.*hazard|(Error|Warning): (Race|Potential))' "$log"; then
    echo "$1: no error in the $2 s that it was given, but it did not get through"
    return 0
  fi
  if [ $status -ne 0 ] && grep -qiE 'device not supported|not supported on|unable to (attach|inject)|failed to initialize' "$log"; then
    echo "$1 does not work on this machine: skipped"
    return 0
  fi
  return $status
}

# Most of their time is one core compiling Triton kernels, so they share the cores where xdist is
# there. What has passed is on the screen when the time is up; a run in which nothing passed fails.
gpu_tests() { # seconds, processes
  local spread=() log="$scratch/gpu_tests.log"
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then spread=(-n "$2"); fi
  timeout -k 5 "$1" "$PYTHON" -m pytest tests/gpu -v -rs --tb=short --durations=5 \
    -p no:cacheprovider ${spread[@]+"${spread[@]}"} 2>&1 | tee "$log"
  [ "${PIPESTATUS[0]}" -eq 0 ] && grep -qE '[0-9]+ passed' "$log"
}
export -f sanitize sanitize_for gpu_tests
export PYTHON scratch

check_on_gpu() {
  part "build" 130 "$PYTHON" -m launch.gpu_parts build
  part "tests/gpu" 130 bash -c "gpu_tests 120 $(($(nproc) > 16 ? 8 : ($(nproc) + 1) / 2))"
  part "compute-sanitizer" 65 bash -c 'sanitize 60'
  part "benchmarks.op" 145 "$PYTHON" -m benchmarks.op ${quick[@]+"${quick[@]}"} --budget 130
  part "benchmarks.rules" 90 "$PYTHON" -m benchmarks.rules ${quick[@]+"${quick[@]}"} --budget 75
  part "benchmarks.layer" 200 "$PYTHON" -m benchmarks.layer ${quick[@]+"${quick[@]}"} \
    --budget $((LIMIT_S - TABLES_S - SECONDS > 200 ? 180 : LIMIT_S - TABLES_S - SECONDS - 20))
  say "tables"
  "$PYTHON" -m launch.gpu_parts tables --since "$started" "$OUT" || fail "tables"
}

# The same parts as far as a CPU goes; nothing measured here counts.
check_without_gpu() {
  fail "no NVIDIA GPU that torch sees on this machine: trying out what runs without one"
  if [ -z "$nvcc" ]; then
    echo "no nvcc: CUDA sources are not compiled"
  else
    part "CUDA kernels compile" 240 env SERE_PYTHON="$PYTHON" bash launch/compile_check.sh
    part "yardsticks compile" 60 "$PYTHON" -m launch.gpu_parts build --arch sm_90a
  fi
  part "Triton kernels compile" 120 "$PYTHON" -m launch.triton_check --arch sm_90 --quick
  part "tests/gpu in Triton's interpreter" 150 env TRITON_INTERPRET=1 \
    bash -c "gpu_tests 140 2"
  part "small case on the CPU" 60 "$PYTHON" -m launch.gpu_parts small-case
  part "benchmarks.op --dry-run" 60 "$PYTHON" -m benchmarks.op --dry-run
  part "benchmarks.rules --dry-run" 60 "$PYTHON" -m benchmarks.rules --dry-run
  part "benchmarks.layer --dry-run" 60 "$PYTHON" -m benchmarks.layer --dry-run
  part "tables of the dry runs" 10 "$PYTHON" -m launch.gpu_parts tables --since "$started" "$OUT"
}

main() {
  nvcc=$("$PYTHON" -c 'from sere_sglang.ops.jit import find_nvcc; print(find_nvcc())' 2>/dev/null)
  say "machine"
  "$PYTHON" -m launch.gpu_parts machine
  [ -n "$nvcc" ] || fail "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda: no CUDA kernels"
  use_wheels
  if [ "$gpu" = yes ]; then check_on_gpu; else check_without_gpu; fi
  if [ ${#failed[@]} -gt 0 ]; then
    printf '\n\033[1;31mFAILED\033[0m %s\n' "${failed[@]}"
    return 1
  fi
  printf '\n\033[1;32mall parts passed\033[0m in %s s; results in %s\n' "$SECONDS" "$OUT"
}

if ! "$PYTHON" -c 'import torch' 2>"$scratch/error"; then
  tail -n 1 "$scratch/error"
  echo "FAILED: $PYTHON has no working torch; SERE_PYTHON=/path/to/python names another" >&2
  exit 1
fi
gpu=$("$PYTHON" -c 'import torch; print("yes" if torch.cuda.is_available() else "no")' 2>/dev/null)
if [ "$gpu" != yes ]; then
  OUT="$scratch/dry"
elif [ -z "${OUT:-}" ]; then
  OUT="$PWD/benchmarks/results/$("$PYTHON" -c \
    'from benchmarks._common import hardware_slug; print(hardware_slug())')"
fi
export OUT
mkdir -p "$OUT" || exit 1
if [ "${1:-}" = --server ]; then
  dry=()
  if [ "$gpu" != yes ]; then dry=(--dry-run); fi
  "$PYTHON" -m launch.gpu_server ${dry[@]+"${dry[@]}"} "${@:2}" 2>&1 | tee "$OUT/gpu_server.log"
  exit "${PIPESTATUS[0]}"
fi
main 2>&1 | tee "$OUT/gpu_check.log"
exit "${PIPESTATUS[0]}"
