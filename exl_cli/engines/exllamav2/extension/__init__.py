"""exllamav2's compiled extension: find it, check it, compile it.

exllamav2's default wheel contains sources. On first import, `torch.utils.cpp_extension.load` compiles them silently for
minutes, or waits forever for the lock of a dead build. `build` runs that import in a child process, with progress, and
keeps the result in exl's cache folder.
"""
