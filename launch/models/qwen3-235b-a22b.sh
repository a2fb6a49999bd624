# Qwen3-235B-A22B, 128 experts, top-8: eight GPUs of 80 GB
MODEL=${MODEL:-Qwen/Qwen3-235B-A22B}
TP=${TP:-8}
