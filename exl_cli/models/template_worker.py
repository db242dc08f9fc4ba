"""The process in which a stranger's chat template renders or tokenizer is tried, with nothing else in reach.

`template_helper` starts it by its path, with `python -I -S` and the folders of its own `sys.path`; it imports nothing
of exl. It imports what its program needs, gives up files, processes and memory for good, and then answers requests
until its standard input ends.

A request is a line of JSON: a list of the template, the time and the variables, or of the text of a tokenizer.json. So
is a reply: its kind, the template's line or 0, and the text or the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

TEXT, REFUSED, BROKEN, STOPPED, FAILED = "text", "refused", "broken", "stopped", "failed"
_MAX_REASON = 1200
_NOBODY = 65534

# What Jinja and Python import only when it is used for the first time; the last line fails.
_WARM_UP = """{% macro m(x) %}{{ x|tojson(indent=1) }}{% endmacro %}{{ m(1.5) }}{{ strftime_now('%c') }}{{ lipsum(1) }}
{{ 'a b'|wordwrap(1) }}{{ [1]|pprint }}{{ '<'|e }}{% generation %}{% endgeneration %}{{ 'x'.encode('ascii') }}
{{ a.b.c }}"""

# A tokenizer may make so many times the text's characters of it.
_MAX_GROWTH = 16
# Letters, digits and signs; scripts of one to four bytes a character; runs, on which some patterns take quadratic time.
_SAMPLE = (
    "".join(map(chr, range(32, 127)))
    + " The quick brown fox jumps over the lazy dog.\n\tÄpfel, naïve œuvre; Ελλάδα, Привет,  שלום, مرحبا, हिन्दी, ไทย, "
    + "日本語, 한국어, 🙂👩\u200d👩\u200d👧 ﬁ ① Ａ \u0301\u00a0\ufeff\u0000"
    + "".join(char * count for char, count in {"a": 500, " ": 200, "\n": 50, "1": 100, "=": 100}.items())
)

Answer = tuple[str, int, str]


def max_text(request: int) -> int:
    """The most bytes of text that may come of a request of so many bytes: more would only keep the tokenizer busy."""
    return (1 << 20) + 8 * request


def give_up(memory: int) -> None:
    """Give up for good what only a program that broke out would use, as far as the platform can refuse it.

    Afterwards no file or socket can be opened, no process started, no environment read, and no more than `memory` bytes
    of address space used. What is open stays open. Root, who could raise the limits again, becomes nobody.
    """
    os.environ.clear()
    with contextlib.suppress(ImportError):  # where the platform has no such limits
        import resource

        for name, value in {"AS": memory, "NOFILE": 0, "FSIZE": 0, "CORE": 0, "NPROC": 0}.items():
            with contextlib.suppress(AttributeError, ValueError, OSError):
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    with contextlib.suppress(AttributeError, OSError):
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)


def allow_cpu(seconds: int) -> None:
    """Have the system end this process after so many more seconds of CPU time, whether or not anybody waits for it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, most))


def renderer() -> Callable[[str, str, dict[str, Any]], Answer]:
    """A function that renders a template, given its source, the local time (ISO 8601) and its variables.

    A MemoryError comes through.
    """
    from datetime import datetime
    from functools import lru_cache

    import jinja2.ext
    from jinja2 import TemplateError, TemplateSyntaxError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.parser import Parser
    from jinja2.runtime import Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class RefusedError(TemplateError):
        """The template called `raise_exception`: it does not take this conversation."""

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks the assistant's text for training; a rendering shows what is inside."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own way

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("inside"), [], [], body, lineno=line)

        def inside(self, caller: Macro) -> str:
            return caller()

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
            raise SecurityError(f"it looks up {attribute!r} of a {type(obj).__name__}")

    def refuse(message: object = "") -> None:
        raise RefusedError(str(message).strip() or "it does not say why")

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    compiled = lru_cache(maxsize=32)(environment.from_string)
    kinds = {TemplateSyntaxError: BROKEN, RefusedError: REFUSED, SecurityError: STOPPED, Exception: FAILED}

    def render(source: str, now: str, variables: dict[str, Any]) -> Answer:
        try:
            variables = {"strftime_now": datetime.fromisoformat(now).strftime, **variables}
            return TEXT, 0, compiled(source).render(variables)
        except MemoryError:
            raise
        except Exception as error:
            kind = next(kind for type_, kind in kinds.items() if isinstance(error, type_))
            reason = "it nests too deep" if isinstance(error, RecursionError) else getattr(error, "message", str(error))
            line = error.lineno if isinstance(error, TemplateSyntaxError) else _line_of(error)
            return kind, line, (reason or type(error).__name__)[:_MAX_REASON]

    return render


def trier() -> Callable[[str], Answer]:
    """A function that tries the tokenizer of a tokenizer.json on a short text, and replies whether it is harmless.

    One that cannot be read is: the parent reads it again, and says what is wrong.
    """
    from tokenizers import Tokenizer

    def sizes(tokenizer: Any, text: str) -> Iterator[int]:
        """Characters or tokens after each step of encoding and decoding; no step is taken before it is asked for."""
        normalizer, splitter = tokenizer.normalizer, tokenizer.pre_tokenizer
        normalized = normalizer.normalize_str(text) if normalizer else text
        yield len(normalized)
        yield sum(len(piece) for piece, _ in splitter.pre_tokenize_str(normalized)) if splitter else 0
        ids = tokenizer.encode(text, add_special_tokens=True).ids
        yield len(ids)
        yield len(tokenizer.decode(ids, skip_special_tokens=False))

    def attempt(request: str) -> Answer:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no thread can be started
        try:
            tokenizer = Tokenizer.from_str(request)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            # Also what its patterns name: a text that makes it grow holds that.
            parts = filter(None, (tokenizer.normalizer, tokenizer.pre_tokenizer))
            text = _SAMPLE + "".join(sorted({char for part in parts for char in part.__getstate__().decode()}))
            size = next((size for size in sizes(tokenizer, text) if size > _MAX_GROWTH * len(text)), 0)
        except Exception:
            return TEXT, 0, ""
        said = f"it makes {size:,} characters or tokens of a text of {len(text):,} characters"
        return (STOPPED, 0, said) if size else (TEXT, 0, "")

    return attempt


def _line_of(error: BaseException) -> int:
    """The template's line, from the traceback that Jinja rewrote to point there; 0 where it does not."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _reply(*answer: str | int) -> None:
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    sys.stdout.buffer.flush()


def main(program: str, cpu_seconds: str, memory: str, *folders: str) -> None:
    """Answer requests, each within so many seconds of computing, all within so many bytes of memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path += folders
    try:
        answer: Callable[..., Answer] = renderer() if program == "templates" else trier()
        if program == "templates":
            answer(_WARM_UP, "2000-01-01", {})
        give_up(int(memory))
    except Exception as error:
        return _reply(FAILED, 0, f"{type(error).__name__}: {error}")
    _reply(TEXT, 0, "")
    for request in sys.stdin.buffer:
        allow_cpu(int(cpu_seconds))
        try:
            kind, line, text = answer(*json.loads(request))
            if len(text) > max_text(len(request)):
                kind, line, text = STOPPED, 0, "it writes too much text"
            _reply(kind, line, text)
        except MemoryError as error:
            # Whether enough of the heap is free for the next rendering is luck: the parent starts a fresh process.
            _reply(STOPPED, _line_of(error), "it needs too much memory")
        except Exception as error:  # such as one that cannot be written out
            _reply(FAILED, 0, type(error).__name__)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
