import os
from torch import cuda, version
from torch.version import __version__

half = "half"


class Tensor:
    def __init__(self, values):
        self.values = list(values)

    def float(self):
        return self

    def cpu(self):
        return self

    def to(self, device):
        if "FAKE_FULL" in os.environ:
            raise cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
        return Tensor(self.values)

    def __truediv__(self, by):
        return Tensor(v / by for v in self.values)

    def __mul__(self, by):
        return Tensor(v * by for v in self.values)

    def softcap_(self, scale):
        self.values = (tanh(self / scale) * scale).values


def linspace(start, end, steps, dtype):
    return Tensor(start + (end - start) * i / (steps - 1) for i in range(steps))


def tanh(tensor):
    import math

    return Tensor(math.tanh(v) for v in tensor.values)


def allclose(a, b, rtol, atol):
    return all(abs(x - y) <= atol + rtol * abs(y) for x, y in zip(a.values, b.values))
