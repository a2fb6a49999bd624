"""In C++ (``csrc/*_cpu.cpp``), for CPU tensors."""
