# gpt-oss-20b, 32 experts, top-4, mxfp4: one GPU of 24 GB
MODEL=${MODEL:-openai/gpt-oss-20b}
TP=${TP:-1}
# What SGLang chooses by itself routes inside its kernel.
FLAGS=(--moe-runner-backend marlin)
