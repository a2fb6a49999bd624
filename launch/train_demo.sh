#!/usr/bin/env bash
# Train the demo model anew from Debian's archive (about 75 minutes on 2 cores with AMX), measure
# it and write it to demo_model/; with --shape shared its sibling, to demo_model_shared/. Ctrl-C
# loses nothing: the same command resumes.
source "$(dirname "${BASH_SOURCE[0]}")/_help.sh" "$@"
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

command -v apt-get >/dev/null && command -v dpkg >/dev/null || {
  echo "the training text comes out of Debian packages: run this on Debian 12" >&2
  exit 1
}
# Batches route other numbers of rows to each expert; without room for their kernels the GEMM
# library would compile them over and over.
export ONEDNN_PRIMITIVE_CACHE_CAPACITY=4096
shape=demo
[[ "$*" =~ --shape[=\ ]([a-z]+) ]] && shape="${BASH_REMATCH[1]}"
"$PYTHON" -m tools.train_demo.train --work "out/train_$shape" "$@"
"$PYTHON" -m tools.train_demo.export --work "out/train_$shape"
