"""In CUDA C++ (``csrc/*.cu``), for NVIDIA GPUs from sm_80."""
