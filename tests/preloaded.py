"""`exl`, and Python, in processes that have imported exl: a program that forks one for each line of its standard input.

For commands of which the output and the exit code are looked at. What concerns the start of a process, its signals or
its terminal is tested with `python -m exl_cli`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__)), str(Path(__file__).parent.parent)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # which ends its input, and so it
    return server


def exl(*arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`exl` with these arguments and nothing to read, in this environment, whose PYTHONPATH comes first."""
    return _run("", arguments, environment)


def python(code: str, *arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Likewise `python -c` with this code."""
    return _run(code, arguments, environment)


def _run(code: str, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        server.stdin.write(json.dumps([code, arguments, dict(environment), str(Path.cwd()), str(out), str(err)]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


def _become(code: str, arguments: list[str], environment: dict[str, str], folder: str, out: str, err: str) -> None:
    for descriptor, file in enumerate((os.devnull, out, err)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in environment
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if not code:
        from exl_cli.__main__ import main

        sys.argv = ["exl", *arguments]
        main()
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 - which is a test's own
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def _serve() -> None:
    import exl_cli.cli.app
    import exl_cli.cli.build
    import exl_cli.cli.doctor
    import exl_cli.ui.progress  # noqa: F401

    assert not {"torch", "pynvml", "huggingface_hub"} & set(sys.modules)  # of which an environment brings its own
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(*json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]
    _serve()
