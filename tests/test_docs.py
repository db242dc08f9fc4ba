"""The examples of README and docs/, in this process and on the CPU.

- ```console: each `$ exl …` is run, and prints what follows it. Lines after `>>> ` are typed, as is what `printf '…' |`
  prints. `$ cat FILE` shows a file, or makes it if it is not there.
- ```python: is run, and prints the ```text block that follows it.
- ```sh and the other ```text blocks, which take a GPU or a network: each `exl …` is parsed, not run.

`[...]` stands for output left out. Measurements and line breaks may differ.
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from exl_cli.cli.app import app
from exl_cli.errors import ExitCode

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
EXL = typer.main.get_command(app)

pytestmark = pytest.mark.skipif(not PAGES, reason="the pages are in the repository only")


def blocks(page: Path) -> list[tuple[str, str]]:
    """A page's fenced blocks: language and text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def sessions(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with its output."""
    parts = re.split(r"^\$ ((?:.*\\\n)*.*)\n", block, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def words_of(line: str) -> list[str]:
    """A shell command as words; bash's $'…' is read too."""
    escapes = {r"\n": "\n"}
    unescaped = re.sub(r"\$?'([^']*\\n[^']*)'", lambda match: shlex.quote(match[1].replace(*escapes.popitem())), line)
    return shlex.split(unescaped.replace("\\\n", " "), comments=True)


def matches(expected: str, printed: str) -> bool:
    """Whether the output is the page's, but for times, the reason for using the CPU, and what a terminal adds."""

    def normal(text: str) -> str:
        text = re.sub(r"^(running on the CPU: |/help lists |>>>).*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"[\d,.]*\d (seconds|tokens/second|tokens/s|MiB)\b", r"N \1", text)
        text = re.sub(r"^(saved; .* --session) \S+", r"\1 NAME", text, flags=re.MULTILINE)
        return "".join(text.split())

    pattern = ".*?".join(re.escape(part) for part in normal(expected).split("[...]"))
    return re.fullmatch(pattern, normal(printed), re.DOTALL) is not None


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty home and working folder, without a GPU: on the CPU a seed fixes the text."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("EXL_MODELS_DIR", "EXL_DATA_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
            patch.delenv(name, raising=False)
        for name, value in {"HOME": str(path), "COLUMNS": "120", "CUDA_VISIBLE_DEVICES": ""}.items():
            patch.setenv(name, value)
        patch.chdir(path)
        if torch.cuda.is_available():
            pytest.skip("another test has begun to use the GPU in this process; run this file alone")
        yield path


@functools.cache
def printed_by(line: str, typed: str) -> str:
    """What a command prints, stdout and stderr as they come. Pages that show the same command share it."""
    words = words_of(line)
    if words[0] == "printf":
        typed, words = words[1], words[3:]
    assert words[0] == "exl"
    return CliRunner().invoke(app, words[1:], input=typed or b"").output


CONSOLE = [
    pytest.param(block, id=f"{page.stem}: {block[2:50]}")
    for page in PAGES
    for language, block in blocks(page)
    if language == "console"
]


@pytest.mark.parametrize("block", CONSOLE)
def test_commands_print_what_the_page_shows(block: str, home: Path) -> None:
    for line, output in sessions(block):
        command, _, name = line.partition(" ")
        if command == "cat":
            if not Path(name).exists():
                Path(name).write_text(output, encoding="utf-8")
            printed = Path(name).read_text(encoding="utf-8")
        else:
            typed = "".join(re.findall(r"^>>> (.*\n)", output, re.MULTILINE))
            printed = printed_by(line, typed).replace(str(ROOT), "~/exl").replace(str(home), "~")
        assert matches(output, printed), printed


@pytest.mark.smoke
@pytest.mark.parametrize("page", [page for page in PAGES if any(kind == "python" for kind, _ in blocks(page))])
def test_python_prints_what_the_page_shows(page: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("langchain_core", reason="needs exl-cli[langchain]")
    found = blocks(page)
    for (language, code), (following, output) in itertools.pairwise(found):
        if language == "python":
            assert following == "text", f"an example without its output:\n{code}"
            exec(compile(code, str(page), "exec"), {"__name__": "__main__"})  # noqa: S102
            printed, said = capsys.readouterr()
            assert said == ""
            assert matches(output, printed), printed


def test_the_page_lists_every_exit_code() -> None:
    codes = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(code) for code in codes] == list(ExitCode)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_a_page_and_a_heading(page: Path) -> None:
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        assert target.exists(), name
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8") if anchor else "", re.MULTILINE)
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_every_command_of_a_shell_block_exists() -> None:
    starts = {"sh": r"(.*[|/]\s?)?(exl \w.*)", "text": r"(\$ )(exl \w.*)"}
    matched = [
        re.fullmatch(starts[language], line)
        for page in PAGES
        for language, block in blocks(page)
        if language in starts
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines = [re.split(r" (?:\||&&|>) ", match[2])[0] for match in matched if match]
    assert len(lines) > 20
    for line in lines:
        name, *words = shlex.split(line, comments=True)[1:]
        EXL.get_command(None, name).make_context(name, [word for word in words if word.strip("[]…")])
