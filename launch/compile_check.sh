#!/usr/bin/env bash
# Compiles the CUDA sources with this machine's nvcc and prints what each kernel takes; needs no
# GPU. Fails on a compile error or a register spill. ARCHS="sm_90a" compiles for fewer. Any Python
# with torch and apache-tvm-ffi will do (SERE_PYTHON); without one the others' .venv is used.
set -uo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

NVCC="${CUDA_HOME:+$CUDA_HOME/bin/nvcc}"
if [ ! -x "$NVCC" ]; then NVCC="$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc || true)"; fi
if [ -z "$NVCC" ]; then
  echo "no nvcc on this machine: the CUDA sources are not compiled here"
  exit 0
fi
if [ -n "${SERE_PYTHON:-}" ] && "$SERE_PYTHON" -c 'import torch, tvm_ffi' 2>/dev/null; then
  PYTHON="$SERE_PYTHON"
  ROOT="$(dirname "$here")"
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
else
  source "$here/_setup.sh"
fi
set +e # a source that does not compile does not stop the others

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mapfile -t flags < <("$PYTHON" -c '
from tvm_ffi import libinfo
from sere_sglang.ops import jit
print(*jit.CUDA_FLAGS, *(f"-I{path}" for path in libinfo.include_paths()), sep="\n")')

"$NVCC" --version | tail -n 2 | head -n 1
[ "${#flags[@]}" -gt 0 ] || { echo "FAILED: no compiler flags from $PYTHON"; exit 1; }
printf '%-8s %-44s %9s %12s %s\n' arch kernel registers "shared bytes" "spilled bytes"
failed=0
for arch in ${ARCHS:-sm_80 sm_90a sm_100}; do
  lines="$work/$arch.lines"
  for source in "$ROOT"/csrc/*.cu; do
    name="$(basename "$source" .cu)"
    log="$work/$name.$arch.log"
    if ! "$NVCC" "${flags[@]}" -I"$ROOT/csrc" "-arch=$arch" -cubin -Xptxas -v \
      "$source" -o "$work/$name.$arch.cubin" >"$log" 2>&1; then
      printf '%s does not compile for %s:\n' "$name" "$arch"
      grep -m 10 -E 'error|fatal' "$log" || tail -n 10 "$log"
      failed=1
      continue
    fi
    # Of every kernel: its mangled name, then its stack and spills, then its registers.
    awk -v arch="$arch" '
      /Function properties for/ { kernel = $NF }
      /bytes spill stores/ { spilled = $5 + $9 }
      /Used [0-9]+ registers/ {
        match($0, /[0-9]+ registers/); registers = substr($0, RSTART, RLENGTH) + 0
        shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART, RLENGTH) + 0 : 0
        print arch, kernel, registers, shared, spilled
        kernels++; spills += spilled
      }
      END { exit spills > 0 || kernels == 0 }' "$log" >>"$lines" || failed=1
  done
  [ -s "$lines" ] || continue
  c++filt <"$lines" \
    | sed -E 's/ (void )?sere::/ /; s/\((int|bool)\)//g; s/\([^)]*\)//; s/, /,/g' | sort -u \
    | while read -r at kernel registers shared spilled; do
      printf '%-8s %-44s %9s %12s %s\n' "$at" "$kernel" "$registers" "$shared" "$spilled"
    done
done
if [ "$failed" -ne 0 ]; then
  echo "FAILED: a kernel does not compile, or spills"
fi
exit "$failed"
