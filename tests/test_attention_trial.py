"""What computes attention is tried in a thread while a model loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import python

from exl_cli.engines.exllamav2.attention import paged
from exl_cli.errors import EngineError

# The choice is left to the machine, and that is a CPU.
ENVIRONMENT = {paged.VARIABLE: "", "CUDA_VISIBLE_DEVICES": ""}
BEGIN = """
import builtins, json, sys, threading
from exl_cli.engines.exllamav2 import paged_attention

def why_not():
    return paged_attention.backend().why_not["flash-attn"]

def trial():
    return next(thread for thread in threading.enumerate() if thread.name == "attention trial")
"""

# Each import tells how many there have been; the first waits until it may go on.
FLASH_ATTN = """
import builtins
builtins.imports = getattr(builtins, "imports", 0) + 1
if builtins.imports == 1:
    builtins.may_go_on.wait()
raise ImportError(f"{WHAT} ({builtins.imports})")
"""


def run(code: str, folder: Path, what: str) -> list[str]:
    """What a program prints, with a flash-attn that fails in that way."""
    (folder / "flash_attn.py").write_text(FLASH_ATTN.replace("{WHAT}", what))
    done = python(BEGIN + code, path=[folder], env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    found: Any = json.loads(done.stdout)
    return list(found)


def test_who_needs_the_choice_waits_for_it(tmp_path: Path) -> None:
    code = """
builtins.may_go_on = threading.Event()
paged_attention.try_ahead()
while not hasattr(builtins, "imports"):
    pass
said = []
waiting = threading.Thread(target=lambda: said.append(why_not()))
waiting.start()
while waiting.ident not in (frames := sys._current_frames()) or "backend" not in frames[waiting.ident].f_code.co_name:
    pass
builtins.may_go_on.set()
waiting.join()
print(json.dumps(said))
"""
    assert run(code, tmp_path, "broken") == ["cannot be imported: broken (1)"]


def test_a_trial_that_found_no_memory_does_not_count(tmp_path: Path) -> None:
    code = """
builtins.may_go_on = threading.Event()
paged_attention.try_ahead()
thread = trial()
builtins.may_go_on.set()
thread.join()
print(json.dumps([why_not(), why_not()]))
"""
    said = run(code, tmp_path, "CUDA out of memory")
    assert said == ["cannot be imported: CUDA out of memory (2)"] * 2


def test_a_name_that_is_wrong_is_said_before_anything_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paged.VARIABLE, "flash")
    with pytest.raises(EngineError, match="EXL_ATTENTION=flash is not known"):
        paged.try_ahead()


def test_heads_of_another_size_are_tried_for_themselves_and_decoding_when_it_is_wanted() -> None:
    code = """
import dataclasses, json, torch
from exl_cli.engines.exllamav2 import paged_attention
from exl_cli.engines.exllamav2.attention.smoke_test import Heads
from exl_cli.engines.exllamav2.attention.backends import IMPLEMENTATIONS, Implementation

asked = []

def attend(call):
    asked.append(call.q.shape[1:])
    if call.q.shape[-1] == 256:
        raise RuntimeError("out of resource: shared memory")
    # A cap that caps nothing: without one, torch's compiler would be imported.
    return IMPLEMENTATIONS["torch"].attend(dataclasses.replace(call, softcap=1e4))

others = dict(IMPLEMENTATIONS)
IMPLEMENTATIONS.clear()
IMPLEMENTATIONS.update({"mine": Implementation(attend, lambda device: "", lambda call: ""), **others})

def choose(*heads, decodes):
    asked.clear()
    chosen = paged_attention.backend(torch.device("cpu"), Heads(*heads), decodes=decodes)
    return [chosen.decode[0], [list(shape) for shape in asked]]

print(json.dumps([
    choose(4, 2, 256, decodes=False), choose(8, 2, 64, decodes=False), choose(4, 4, 64, decodes=False),
    choose(8, 2, 64, decodes=True), choose(8, 2, 64, decodes=False), choose(4, 2, 256, decodes=False),
]))
"""
    done = python(code, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [
        ["torch", [[40, 4, 256]]],
        ["mine", [[40, 8, 64]]],
        ["mine", []],
        ["mine", [[40, 8, 64], [1, 8, 64]]],
        ["mine", []],
        ["torch", []],
    ]
