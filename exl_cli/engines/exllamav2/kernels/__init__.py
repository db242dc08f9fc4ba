"""CUDA kernels of our own, for what a decode step spends its time on. `compiler` compiles them.

Looked at first: Marlin and Machete want GPTQ weights in an order of their own, and do not know EXL2's mixed widths;
FLUTE and BitBLAS compile for formats of theirs; GemLite, in Triton, takes widths of 1, 2, 4 and 8 bits in its own
packing. None takes the weights where exllamav2 leaves them, where its kernels for long prompts need them, and a second
copy would double the model's memory. The kernels here read them in place: their packed order, as it lies, is that of
the tensor cores' operands (`gemv.cu`), which Triton has no words for.
"""
