#!/usr/bin/env bash
# Calibrates a model once, serves it with SERE, and measures the server, with flags that fit it.
#   bash launch/model.sh NAME [calibrate | serve | bench] [--dry-run] [-- further flags]
# NAME is one of launch/models/. Without a step: calibrate where there is no profile (or go on with
# an interrupted one), then serve; Ctrl-C stops the server. bench is run beside a server that is up;
# its prompts are drawn from a dataset that SGLang downloads. --dry-run only prints the commands.
# Flags behind -- go to the last command. MODEL, TP and PORT in the environment replace the model's
# folder or hub id, the number of GPUs, and port 30000; sglang and sere-sglang are those on PATH.
# Nothing of this has been run on a GPU yet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

help() {
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  printf 'Models:\n'
  for file in "$here"/models/*.sh; do
    printf '  %-20s%s\n' "$(basename "$file" .sh)" "$(sed -n '1s/^# //p' "$file")"
  done
}

run() {
  if [ "$dry" = no ]; then "$@"; return; fi
  printf '%q ' "$@"
  printf '\n'
}

name= step= dry=no
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    -h | --help) help; exit ;;
    --dry-run) dry=yes ;;
    calibrate | serve | bench)
      if [ -n "$step" ]; then echo "model.sh: $step or $1? one step at a time" >&2; exit 2; fi
      step=$1
      ;;
    *) if [ -n "$name" ]; then echo "model.sh: what is $1? see --help" >&2; exit 2; fi; name=$1 ;;
  esac
  shift
done
if [ "${1:-}" = -- ]; then shift; fi
if [ -z "$name" ]; then help >&2; exit 2; fi
if [ ! -f "$here/models/$name.sh" ]; then
  echo "model.sh: no launch/models/$name.sh; there are: $(basename -s .sh "$here"/models/*.sh | xargs)" >&2
  exit 2
fi

# What a model may say: MODEL, TP and FLAGS (of SGLang, also while it is calibrated).
FLAGS=()
source "$here/models/$name.sh"
serving=(--tp-size "$TP" ${FLAGS[@]+"${FLAGS[@]}"})

if [ "${step:-calibrate}" = calibrate ]; then
  if [ "$step" != calibrate ]; then further=(); else further=("$@"); fi
  run sere-sglang calibrate --model "$MODEL" --if-missing -- "${serving[@]}" \
    ${further[@]+"${further[@]}"}
fi
if [ "${step:-serve}" = serve ]; then
  run sglang serve --model-path "$MODEL" --port "${PORT:-30000}" "${serving[@]}" \
    --moe-backend sere "$@"
fi
if [ "$step" = bench ]; then
  run python -m sglang.benchmark.serving --backend sglang --port "${PORT:-30000}" \
    --dataset-name random --random-input-len 256 --random-output-len 256 \
    --num-prompts 256 --max-concurrency 32 "$@"
fi
