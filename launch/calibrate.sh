#!/usr/bin/env bash
# Calibrates a model with every measure, and writes a page of pictures beside its profile.
#   bash launch/calibrate.sh MODEL [TEXT ...] [-- flags of sere-sglang calibrate]
# MODEL is a folder; TEXT are .txt, .jsonl or .parquet files (default: a text that ships with us).
# An interrupted calibration is continued by the next call.
source "$(dirname "${BASH_SOURCE[0]}")/_help.sh" "$@"
if [ $# -eq 0 ]; then
  bash "${BASH_SOURCE[0]}" --help >&2
  exit 2
fi
case $1 in /*) model=$1 ;; *) model=$PWD/$1 ;; esac
shift
texts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in /*) texts+=(--data "$1") ;; *) texts+=(--data "$PWD/$1") ;; esac
  shift
done
if [ "${1:-}" = -- ]; then shift; fi
flags=("$@")
set --
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

command=$(dirname "$PYTHON")/sere-sglang
profile=$model/sere_profile.safetensors
if [ -e "$profile.partial" ]; then flags+=(--resume); fi
"$command" calibrate --model "$model" --measure all \
  ${texts[@]+"${texts[@]}"} ${flags[@]+"${flags[@]}"}
"$command" inspect "$profile" --plot "${profile%.safetensors}.png"
