"""What `exl run` does while the GPU hangs, as a program that prints it: the error line, the exit code and the seconds.

python tests/gpu/hanging_gpu.py
"""

from __future__ import annotations

import subprocess
import sys
import time

PROGRAM = """
import sys, torch
from exl_cli.engines.exllamav2 import cuda_errors, forward
from exl_cli import __main__
cuda_errors.HANGS_AFTER = 3.0
submit, passes = forward.GpuForward.submit, []
def hang(self, rows, draws=()):
    passes.append(0)
    submit(self, rows, draws)
    if len(passes) == 8:
        torch.cuda._sleep(10**13)  # an hour and more
forward.GpuForward.submit = hang
sys.argv = ["exl", "run", "-p", "Once upon a time", "-n", "40"]
__main__.main()
"""


def main() -> None:
    since = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100)
    print(f"exit code {done.returncode} after {time.perf_counter() - since:.1f} s\n{done.stderr[-500:]}")


if __name__ == "__main__":
    main()
