# GLM-4.5 in fp8, 160 experts, top-8, a shared expert: eight GPUs of 80 GB
MODEL=${MODEL:-zai-org/GLM-4.5-FP8}
TP=${TP:-8}
FLAGS=(--moe-runner-backend triton)
