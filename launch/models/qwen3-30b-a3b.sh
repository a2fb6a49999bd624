# Qwen3-30B-A3B, 128 experts, top-8: one GPU of 80 GB
MODEL=${MODEL:-Qwen/Qwen3-30B-A3B}
TP=${TP:-1}
