# GLM-4.5-Air in fp8, 128 experts, top-8, a shared expert: two GPUs of 80 GB
MODEL=${MODEL:-zai-org/GLM-4.5-Air-FP8}
TP=${TP:-2}
FLAGS=(--moe-runner-backend triton)
