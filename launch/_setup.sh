# Sourced by the other scripts: leaves $ROOT and $PYTHON, a Python that has everything, set up in
# .venv on first use. SERE_PYTHON=/path/to/python uses an environment of yours instead.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
NEEDS_DISK_GIB=12
NEEDS_MEMORY_GIB=8

say() { printf '\033[1m[setup]\033[0m %s\n' "$*" >&2; }
stop() { printf '\033[1;31m[setup]\033[0m %s\n' "$*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
      2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  stop "no Python 3.11 or 3.12 with the venv module on PATH; install Python 3.11"
}

check_machine() {
  local memory disk
  memory=$(awk '/MemTotal/ { print int($2 / 1048576 + 0.5) }' /proc/meminfo)
  disk=$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1048576) }')
  say "needs $NEEDS_DISK_GIB GiB of disk and $NEEDS_MEMORY_GIB GiB of memory;" \
    "this machine has $disk GiB free and $memory GiB"
  [ "$disk" -ge "$NEEDS_DISK_GIB" ] || stop "not enough disk under $ROOT (SGLang and torch take 10)"
  [ "$memory" -ge "$NEEDS_MEMORY_GIB" ] || stop "not enough memory to serve the demo model twice"
  command -v "${CXX:-g++}" >/dev/null || stop "no C++ compiler: install g++ (or set CXX)"
}

install_everything() {
  local python uv
  python=$(find_python)
  if ! "$VENV/bin/python" -c 'import sys' 2>/dev/null; then
    say "creating .venv with $python"
    "$python" -m venv --clear "$VENV"
  fi
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null
  uv=$(command -v uv || true)
  if [ -z "$uv" ] && "$VENV/bin/python" -m pip install -q uv; then uv="$VENV/bin/uv"; fi
  say "installing $(grep -c == "$ROOT/requirements.lock") pinned packages (first time: about 4 GB" \
    "to download; later checkouts reuse them)"
  # Hard links need the cache and .venv on one file system; elsewhere uv copies by itself.
  if [ -n "$uv" ] && "$uv" pip install --python "$VENV/bin/python" -r "$ROOT/requirements.lock" \
    && "$uv" pip install -q --python "$VENV/bin/python" --no-deps -e "$ROOT"; then
    return
  fi
  say "uv is not there or failed; falling back to pip"
  "$VENV/bin/python" -m pip install -r "$ROOT/requirements.lock"
  "$VENV/bin/python" -m pip install -q --no-deps -e "$ROOT"
}

set_up() {
  if [ -n "${SERE_PYTHON:-}" ]; then
    PYTHON="$SERE_PYTHON"
    "$PYTHON" -c 'import sglang, sere_sglang' 2>/dev/null || stop \
      "SERE_PYTHON=$PYTHON lacks sglang or sere_sglang: run '$PYTHON -m pip install -e \"$ROOT\"'"
    return
  fi
  PYTHON="$VENV/bin/python"
  local wanted
  wanted=$(cat "$ROOT/requirements.lock" "$ROOT/pyproject.toml" | sha256sum; echo "$ROOT")
  # The mark is written last, so an interrupted set-up is taken up again.
  if [ "$(cat "$VENV/.sere-ready" 2>/dev/null)" != "$wanted" ]; then
    check_machine
    SECONDS=0
    install_everything
    printf '%s\n' "$wanted" >"$VENV/.sere-ready"
    say "done in $SECONDS s, $(du -sh "$VENV" | cut -f1) in .venv"
  fi
}

# Two scripts started at once must not install into one folder.
exec 9>"$ROOT/.setup.lock"
flock 9
set_up
flock -u 9
# A server is several processes that each import SGLang: seconds with bytecode, 15 without.
unset PYTHONDONTWRITEBYTECODE
export PYTHON ROOT
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
cd "$ROOT"
