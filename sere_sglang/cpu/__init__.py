"""The CPU engine's MoE runner: not re-routing, but what serves it where there is no GPU."""
