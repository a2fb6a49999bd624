"""What a server does, seen from outside: servers started or found, load, text walked in batches.

`server` starts and speaks to SGLang, `load` times streams, `forcing` walks held-out text with the
server's own batches, `turns` lets routings take turns at either. ``sere-sglang bench`` and
``evaluate`` are the commands made of it; the repository's benchmarks and server tests use it too.
"""
