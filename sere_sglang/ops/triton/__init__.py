"""In Triton, for GPUs; under ``TRITON_INTERPRET=1`` for CPU tensors too, slowly."""
