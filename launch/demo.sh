#!/usr/bin/env bash
# One command: install, serve the demo model plain and with SERE, compare speed and quality.
#   bash launch/demo.sh [--streams 1 8 32] [--rounds 3] ...   (bash launch/demo.sh --help)
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

exec "$PYTHON" -m benchmarks.demo "$@"
