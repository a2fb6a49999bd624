# Mixtral-8x7B, 8 experts, top-2: two GPUs of 80 GB; with S = 1 there is one slot to move
MODEL=${MODEL:-mistralai/Mixtral-8x7B-Instruct-v0.1}
TP=${TP:-2}
