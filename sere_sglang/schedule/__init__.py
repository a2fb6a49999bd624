"""Between steps: batch composition -> policy -> control block."""
