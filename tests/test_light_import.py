"""exllamav2 is imported without what takes long and is not needed; whoever needs it gets it all the same."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from helpers import python

REAL = pytest.mark.skipif(importlib.util.find_spec("exllamav2") is None, reason="exllamav2 is not installed")

BEGIN = """
import json, os, sys
from exl_cli.engines.exllamav2 import light_import
"""

# Torch's compiler, what comes with it, and what builds extensions: 10 to 700 modules each.
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed", "setuptools", "torch.utils.cpp_extension")


def run(code: str, *path: Path) -> dict[str, Any]:
    """What a program of its own prints as JSON."""
    done = python(BEGIN + textwrap.dedent(code), path=path)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@REAL
def test_loading_a_model_imports_no_compiler() -> None:
    """All that is imported on the way of `exl run`."""
    code = f"""
    import fakeextension, torch
    fakeextension.install()
    torch_alone = set(sys.modules)
    from exl_cli.engines.exllamav2 import engine, import_exllamav2
    from exl_cli.engines.exllamav2.attention import causal, paged
    light_import.import_model()
    causal.install()
    paged.install_paged()
    from exllamav2 import attn
    names = {HEAVY!r}
    print(json.dumps({{
        "there": [name for name in names if name in sys.modules and name not in torch_alone],
        "new": len(set(sys.modules) - torch_alone),
        "sdpa": attn.has_lower_right_sdpa,
        "variable": os.environ.get("EXLLAMA_NO_SDPA"),
    }}))
    """
    found = run(code)
    assert found["there"] == []
    # 1,122 with all of it.
    assert found["new"] < 300
    assert found["sdpa"] is False
    assert found["variable"] is None


@REAL
def test_what_was_left_out_is_had_by_who_asks_for_it() -> None:
    code = """
    import fakeextension
    fakeextension.install()
    light_import.import_model()
    light_import.import_model()
    import exllamav2
    from exllamav2.ext import load
    compiling = "torch.utils.cpp_extension" in sys.modules
    try:
        load()
    except TypeError as error:  # of the real function: it has arguments that must be given
        said = str(error)
    from torch.nn.attention.bias import causal_lower_right
    from torch.utils.cpp_extension import BuildExtension
    print(json.dumps({
        "compiling": compiling, "said": said, "class": isinstance(BuildExtension, type),
        "mask": causal_lower_right(2, 3).variant.name, "version": exllamav2.__version__,
    }))
    """
    found = run(code)
    assert found["compiling"] is False
    assert found["said"].startswith("load() missing")
    assert (found["class"], found["mask"]) == (True, "LOWER_RIGHT")
    assert found["version"].startswith("0.")


def package(folder: Path, **files: str) -> Path:
    """A package of that name with these files."""
    (folder / "exllamav2").mkdir()
    for name, text in {"__init__": "from exllamav2.model import thing\n", **files}.items():
        (folder / "exllamav2" / f"{name}.py").write_text(text)
    return folder


def test_a_failed_import_leaves_nothing_behind(tmp_path: Path) -> None:
    code = """
    said = []
    for _ in range(2):
        try:
            light_import.import_model()
        except ImportError as error:
            said.append(error.name)
    left = [name for name in ("exllamav2", "exllamav2.model", "torch.utils.cpp_extension") if name in sys.modules]
    print(json.dumps({"said": said, "done": light_import.is_done(), "left": left + [
        name for name in os.environ if name == "EXLLAMA_NO_SDPA"]}))
    """
    found = run(code, package(tmp_path, model="import no_such_package\n"))
    assert found == {"said": ["no_such_package"] * 2, "done": False, "left": []}


def test_one_that_was_imported_before_is_taken_as_it_is(tmp_path: Path) -> None:
    code = """
    import exllamav2
    before = vars(exllamav2)["thing"]
    light_import.import_model()
    print(json.dumps({"same": sys.modules["exllamav2"] is exllamav2, "thing": before, "done": light_import.is_done()}))
    """
    assert run(code, package(tmp_path, model="thing = 1\n")) == {"same": True, "thing": 1, "done": True}
