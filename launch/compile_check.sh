#!/usr/bin/env bash
# Compiles the CUDA sources with this machine's nvcc and prints what each kernel takes; needs no
# GPU. Fails on a compile error or a register spill. ARCHS="sm_90a" compiles for fewer. Any Python
# with torch and apache-tvm-ffi will do (SERE_PYTHON); without one the others' .venv is used.
source "$(dirname "${BASH_SOURCE[0]}")/_help.sh" "$@"
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
# One source for one architecture: NAME.lines of every kernel, NAME.error of what must not be.
compile() {
  local arch="$1" source="$2" name="$work/$2.$1"
  if ! "$NVCC" "${flags[@]}" -I"$ROOT/csrc" "-arch=$arch" -cubin -Xptxas -v \
    "$ROOT/csrc/$source.cu" -o "$name.cubin" >"$name.log" 2>&1; then
    printf '%s does not compile for %s:\n' "$source" "$arch" >"$name.error"
    grep -m 10 -E 'error|fatal' "$name.log" >>"$name.error" || tail -n 10 "$name.log" >>"$name.error"
    return
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
    END { exit spills > 0 || kernels == 0 }' "$name.log" >"$name.lines" \
    || printf '%s spills registers, or has no kernel, for %s\n' "$source" "$arch" >"$name.error"
}

read -r -a archs <<<"${ARCHS:-sm_80 sm_90a sm_100}"
for arch in "${archs[@]}"; do
  for source in "$ROOT"/csrc/*.cu; do
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
    compile "$arch" "$(basename "$source" .cu)" &
  done
done
wait
for arch in "${archs[@]}"; do
  cat "$work"/*."$arch".lines 2>/dev/null \
    | c++filt \
    | sed -E 's/ (void )?sere::/ /; s/\((int|bool)\)//g; s/\([^)]*\)//; s/, /,/g' | sort -u \
    | while read -r at kernel registers shared spilled; do
      printf '%-8s %-44s %9s %12s %s\n' "$at" "$kernel" "$registers" "$shared" "$spilled"
    done
done
if compgen -G "$work/*.error" >/dev/null; then
  cat "$work"/*.error
  echo "FAILED: a kernel does not compile, or spills"
  exit 1
fi
