"""Compiling exllamav2's extension on purpose: what it takes, where it lies, whether it fits, the build.

exllamav2's wheel holds sources. Its first import hands them to `torch.utils.cpp_extension.load`, which compiles for
minutes without a word and waits for ever on the lock of a build that died. Here the same build is driven in the open:

- `here`, `extension`: what this machine is and which extension it has, found without importing torch;
- `toolchain`, `remedies`: the compilers, and the command that installs what is missing;
- `jobs`: how many compilers at once, and how long it takes;
- `lock`: one build at a time, and which lock nobody holds any more;
- `configure`, `ninja`, `worker`, `trial`: what runs in processes of its own (`children`);
- `build`: starts and stops those, and tells how they are going;
- `carry`: the result as a wheel for another machine;
- `failures`: what an import or a compiler says when it fails, in one line with the next step.
"""
