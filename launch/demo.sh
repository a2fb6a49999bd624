#!/usr/bin/env bash
# One command: install, calibrate, serve the demo model plain and with SERE, compare.
#   bash launch/demo.sh [--concurrency 1 8 32] [--rounds 3] ...   (python -m launch.demo --help)
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

mkdir -p out/demo
profile=out/demo/sere_profile.safetensors
if [ "${1:-}" != "--help" ] && [ ! -s "$profile" ]; then
  "$PYTHON" -m sere_sglang.cli.main calibrate --model demo_model \
    --data demo_model/data/calibration.txt --tokens 8192 --out "$profile"
fi
exec "$PYTHON" -m launch.demo --profile "$profile" "$@"
