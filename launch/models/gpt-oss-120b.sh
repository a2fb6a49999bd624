# gpt-oss-120b, 128 experts, top-4, mxfp4: one GPU of 80 GB
MODEL=${MODEL:-openai/gpt-oss-120b}
TP=${TP:-1}
# What SGLang chooses by itself routes inside its kernel.
FLAGS=(--moe-runner-backend marlin)
