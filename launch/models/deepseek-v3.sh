# DeepSeek-V3, 256 experts in groups, top-8, fp8: eight GPUs of 141 GB
MODEL=${MODEL:-deepseek-ai/DeepSeek-V3}
TP=${TP:-8}
# Not deep_gemm: its masked layout counts rows by expert (runtime/runners.py).
FLAGS=(--trust-remote-code --moe-runner-backend triton)
