"""The ``sere-sglang`` command."""
