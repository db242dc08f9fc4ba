import glob, os
from torch.utils.cpp_extension import load
import torch

build_jit = False
try:
    import exllamav2_ext
except ModuleNotFoundError:
    build_jit = True
if build_jit:
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{a}.{b}" for a, b in torch.cuda._gpus)
    here = os.path.join(os.path.dirname(__file__), "exllamav2_ext")
    exllamav2_ext = load(
        name="exllamav2_ext",
        sources=sorted(glob.glob(here + "/*.c*")),
        extra_include_paths=[here],
        verbose=False,
        extra_ldflags=[],
        extra_cuda_cflags=[],
        extra_cflags=[],
    )
ext_c = exllamav2_ext
