# SGLang's own image with this plugin:
#   docker build -t sere-sglang .
#   docker run --gpus all --ipc host -p 30000:30000 -v sere-cache:/cache sere-sglang \
#     --model-path Qwen/Qwen3-30B-A3B --moe-backend sere --sere-profile auto
# SGLANG_IMAGE: the version that sere-sglang is tested with (sere_sglang.patches.TESTED_VERSIONS).
# CUDA_ARCH: compile the kernels into the image (sm_80, sm_90a, sm_100) instead of at first use.
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.23
FROM ${SGLANG_IMAGE}

ARG CUDA_ARCH=
ARG USER_ID=10001

# Models, kernels and calibrated profiles, outside of the image: mount a volume there.
ENV HOME=/home/sere \
    HF_HOME=/cache/huggingface \
    SERE_CACHE_DIR=/cache/sere-sglang
RUN useradd --uid ${USER_ID} --create-home --home-dir /home/sere sere \
    && mkdir -p /cache && chown ${USER_ID} /cache

COPY pyproject.toml README.md LICENSE /opt/sere-sglang/
COPY sere_sglang /opt/sere-sglang/sere_sglang
COPY csrc /opt/sere-sglang/csrc
COPY patches /opt/sere-sglang/patches
# SGLang is in the image: pip must not put another one in its place.
RUN python3 -c "from importlib.metadata import version; print('sglang==' + version('sglang'))" \
      > /tmp/sglang.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/sglang.txt /opt/sere-sglang \
    && rm /tmp/sglang.txt

USER ${USER_ID}
RUN if [ -n "${CUDA_ARCH}" ]; then sere-sglang doctor --build --cuda-arch "${CUDA_ARCH}"; fi
VOLUME /cache
EXPOSE 30000
# A large model takes minutes to load, and with --sere-profile auto to calibrate.
HEALTHCHECK --interval=15s --timeout=10s --start-period=30m --retries=4 \
  CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:30000/health', timeout=8)"]
ENTRYPOINT ["sglang", "serve", "--host=0.0.0.0", "--port=30000"]
CMD ["--help"]
