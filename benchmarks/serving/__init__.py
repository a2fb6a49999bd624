"""How serving is measured: servers that take turns, their load, their quality, and the pictures.

`benchmarks.demo`, `adaptive`, `idle_cost` and `expected_loss` are the commands made of it; the
server tests start their servers with it too.
"""
