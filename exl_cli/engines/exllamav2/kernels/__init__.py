"""CUDA kernels of our own, for what a decode step spends its time on. `compiler` compiles them."""
