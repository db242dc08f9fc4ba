"""exllamav2's compiled extension: where it is, whether it fits, and compiling it.

exllamav2's wheel holds sources. Its first import hands them to `torch.utils.cpp_extension.load`, which compiles for
minutes without a word and waits endlessly for the lock of a build that died. `build` runs that import in a process
that it follows and can stop, and keeps the result in a folder of exl's own.
"""
