# Qwen1.5-MoE-A2.7B, 60 experts, top-4, a shared expert: one GPU of 40 GB
MODEL=${MODEL:-Qwen/Qwen1.5-MoE-A2.7B}
TP=${TP:-1}
