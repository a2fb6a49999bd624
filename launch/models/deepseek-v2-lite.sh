# DeepSeek-V2-Lite, 64 experts, top-6, two shared experts: one GPU of 40 GB
MODEL=${MODEL:-deepseek-ai/DeepSeek-V2-Lite}
TP=${TP:-1}
FLAGS=(--trust-remote-code)
