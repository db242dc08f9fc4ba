"""README's Python examples, run as they stand; the text block after each is what it prints, times and rates aside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("langchain_core", reason="needs exl-cli[langchain]")

ROOT = Path(__file__).parent.parent
HEADING = "## From Python and LangChain\n"


def examples() -> list[tuple[str, str]]:
    """Each example and its output, as README gives them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
    section = re.split(r"^## ", readme.partition(HEADING)[2], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", section, flags=re.DOTALL)


def without_times(text: str) -> str:
    return re.sub(r"\d+\.\d\d (seconds|tokens/second)", r"N \1", text).rstrip()


@pytest.mark.smoke
def test_readmes_python_prints_what_readme_says(tmp_path: Path) -> None:
    found = examples()
    assert len(found) == 3, "README has no such section, or an example of it has lost its output"
    program = "\nprint('-' * 40)\n".join(code for code, _ in found)
    # On the CPU, since README shows what that prints: there a seed fixes the text.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.split("-" * 40 + "\n")
    assert [without_times(text) for text in printed] == [without_times(output) for _, output in found]
