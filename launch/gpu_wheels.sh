#!/usr/bin/env bash
# Downloads into .whl/ what launch/gpu_check.sh needs on a GPU machine without a network: tvm-ffi for
# the CUDA kernels, pytest-xdist for their tests and, for the layer benchmark, SGLang's own Triton
# fused MoE. Run it here, with pip; take .whl/ along. The machine there: Linux x86-64, Python 3.12,
# torch 2.11 for CUDA 13.
#   bash launch/gpu_wheels.sh           all of it (about 37 MB)
#   bash launch/gpu_wheels.sh --small   without SGLang; the layer benchmark then uses its own GEMM
source "$(dirname "${BASH_SOURCE[0]}")/_help.sh" "$@"
case "${1:-}" in
  "" | --small) ;;
  *) echo "gpu_wheels.sh: what is $1? see --help" >&2; exit 2 ;;
esac
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${SERE_PYTHON:-python3}"
LIMIT_MB=40
# SGLang 0.5.17 is the release that pins torch 2.11; the rest is what importing its fused MoE needs
# beyond torch's and Hugging Face's usual packages.
KERNELS=(apache-tvm-ffi==0.1.11 pytest-xdist==3.8.0 execnet==2.1.2)
SGLANG=(
  sglang==0.5.17 transformers==5.12.1 tokenizers==0.22.2
  annotated-types==0.8.0 dill==0.4.1 httpx2==2.16.2 ipython==9.18.1 msgspec==0.22.0 openai==3.54.0
  orjson==3.13.0 partial_json_parser==0.2.1.1.post7 pybase64==1.5.1 pydantic==2.14.3
  pydantic-core==2.50.4 pyzmq==27.3.0 sniffio==1.3.1 starlette==1.10.0 traitlets==5.16.1
  typing-inspection==0.4.5 xgrammar==0.2.8
)
SGLANG_KERNEL=sglang-kernel==0.4.5

download() { # folder, requirements
  local folder="$1" platforms=() version
  shift
  for version in 2_17 2_24 2_26 2_27 2_28 2_31 2_34 2_35 2_39; do
    platforms+=(--platform "manylinux_${version}_x86_64")
  done
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --abi cp312 --abi abi3 --abi none --platform manylinux2014_x86_64 \
    "${platforms[@]}" -d "$folder" "$@"
}

# Writes a wheel anew with only the files that match, packed tighter; 380 MB of kernels become 13.
strip_wheel() { # wheel, regular expression of the names to keep
  "$PYTHON" - "$@" <<'PY'
import pathlib, re, sys, zipfile

source, keep = sys.argv[1:]
with zipfile.ZipFile(source) as old, zipfile.ZipFile(
    pathlib.Path(".whl") / pathlib.Path(source).name, "w"
) as new:
    for name in old.namelist():
        if re.search(keep, name):
            data = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(x for x in lines if re.search(keep, x.split(",")[0])).encode()
            method = zipfile.ZIP_LZMA if name.endswith(".so") else zipfile.ZIP_DEFLATED
            new.writestr(old.getinfo(name), data, method, 9)
PY
}

rm -rf .whl
mkdir .whl
download .whl "${KERNELS[@]}"
if [ "${1:-}" != --small ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  download .whl "${SGLANG[@]}"
  mv .whl/{sglang,transformers,tokenizers,pydantic_core}-*.whl "$scratch"
  download "$scratch" "$SGLANG_KERNEL"
  strip_wheel "$scratch"/sglang-*.whl '^sglang(-|/(?!.*\.so$|multimodal_gen/|test/|srt/models/|'\
'.*/configs/.*device_name=(?!NVIDIA_H[12]00[,._])))'
  strip_wheel "$scratch"/sglang_kernel-*.whl \
    '^(sglang_kernel-|sgl_kernel/(.*\.py|sm90/common_ops.*)$)'
  strip_wheel "$scratch"/transformers-*.whl \
    '^transformers(-|/(?!models/(?!auto/)[^/]*/(modular|modeling|image|video|feature)[^/]*$))'
  for wheel in "$scratch"/{tokenizers,pydantic_core}-*.whl; do strip_wheel "$wheel" .; done
fi

size=$(du -sm .whl | cut -f1)
ls -l .whl | awk 'NR > 1 { printf "%6.1f MB  %s\n", $5 / 1e6, $9 }'
echo "$size MB in .whl/"
[ "$size" -le "$LIMIT_MB" ] || { echo "more than $LIMIT_MB MB: try --small" >&2; exit 1; }
