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
# Of exllamav2 itself.
UNUSED = ("exllamav2.generator", "exllamav2.tokenizer", "exllamav2.vlm", "PIL")


def run(code: str, *path: Path) -> dict[str, Any]:
    """What a program of its own prints as JSON."""
    done = python(BEGIN + textwrap.dedent(code), path=path)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@REAL
def test_loading_a_model_imports_no_compiler() -> None:
    """All that is imported on the way of `exl run`, torch's attention over pages looked for included."""
    code = f"""
    import fakeextension, torch
    fakeextension.install()
    torch_alone = set(sys.modules)
    from exl_cli.engines.exllamav2 import door, engine, attention, paged_attention
    light_import.import_model()
    attention.install()
    paged_attention.install_paged()
    from exllamav2 import attn
    names = {HEAVY + UNUSED!r}
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
    assert found["new"] < 250
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
    initialized = "ExLlamaV2Tokenizer" in vars(exllamav2)
    from exllamav2 import ExLlamaV2Tokenizer
    from exllamav2.generator import ExLlamaV2DynamicGenerator
    print(json.dumps({
        "compiling": compiling, "said": said, "class": isinstance(BuildExtension, type),
        "mask": causal_lower_right(2, 3).variant.name, "initialized": initialized,
        "same": exllamav2.ExLlamaV2 is sys.modules["exllamav2.model"].ExLlamaV2, "version": exllamav2.__version__,
        "from": [ExLlamaV2Tokenizer.__module__, ExLlamaV2DynamicGenerator.__module__],
    }))
    """
    found = run(code)
    assert (found["compiling"], found["initialized"]) == (False, False)
    assert found["said"].startswith("load() missing")
    assert (found["class"], found["mask"], found["same"]) == (True, "LOWER_RIGHT", True)
    assert found["version"].startswith("0.")
    assert found["from"] == ["exllamav2.tokenizer.tokenizer", "exllamav2.generator.dynamic"]


def package(folder: Path, **files: str) -> Path:
    """A package of that name with these files, and an `__init__` that tells that it ran."""
    (folder / "exllamav2").mkdir()
    for name, text in {"__init__": "print('init')\nfrom exllamav2.model import thing\n", **files}.items():
        (folder / "exllamav2" / f"{name}.py").write_text(text)
    return folder


def test_submodules_are_no_reason_to_run_the_init(tmp_path: Path) -> None:
    code = """
    light_import.import_model()
    import exllamav2
    from exllamav2 import other, model
    import exllamav2.third
    print(json.dumps({"there": sorted(name for name in vars(exllamav2) if not name.startswith("__"))}))
    """
    found = run(code, package(tmp_path, model="from exllamav2 import other\nthing = 1\n", other="", third=""))
    assert found["there"] == ["model", "other", "third"]


def test_the_init_runs_once_and_what_is_nowhere_is_an_attribute_error(tmp_path: Path) -> None:
    code = """
    light_import.import_model()
    import exllamav2
    missing = [hasattr(exllamav2, name) for name in ("__wrapped__", "nothing", "nothing")]
    print(json.dumps({"thing": exllamav2.thing, "missing": missing, "path": exllamav2.__file__}))
    """
    folder = package(
        tmp_path, model="thing = 1\n", __init__="import builtins\nbuiltins.runs = 1\nfrom .model import thing\n"
    )
    found = run(code, folder)
    assert found == {"thing": 1, "missing": [False] * 3, "path": str(folder / "exllamav2" / "__init__.py")}


def test_an_init_that_fails_says_so_each_time(tmp_path: Path) -> None:
    code = """
    light_import.import_model()
    import exllamav2
    said = []
    for _ in range(2):
        try:
            exllamav2.thing
        except ImportError as error:
            said.append(error.name)
    print(json.dumps({"said": said, "model": exllamav2.model.thing}))
    """
    found = run(code, package(tmp_path, model="thing = 1\n", __init__="import no_such_package\n"))
    assert found == {"said": ["no_such_package"] * 2, "model": 1}


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
