"""The sandboxed process that renders untrusted chat templates and tests untrusted tokenizers.

`template_helper` starts this file with `python -I -S` and its own `sys.path`; it imports nothing from exl. The worker
imports its libraries, drops its rights to open files, start processes and use more memory, and then serves requests
until EOF on stdin.

Protocol, one JSON array per line. Request: [template source, local time, variables], or [text of tokenizer.json].
Reply: [kind, line of the template or 0, text or reason]. The process must be replaced after a SPENT reply.
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

TEXT, REFUSED, BROKEN, STOPPED, FAILED, SPENT = "text", "refused", "broken", "stopped", "failed", "spent"
_MAX_REASON = 1200
_NOBODY = 65534

# Triggers the lazy imports of Jinja and Python, which would fail later without files; the last line raises an error.
_WARM_UP = """{% macro m(x) %}{{ x|tojson(indent=1) }}{% endmacro %}{{ m(1.5) }}{{ strftime_now('%c') }}{{ lipsum(1) }}
{{ 'a b'|wordwrap(1) }}{{ [1]|pprint }}{{ '<'|e }}{% generation %}{% endgeneration %}{{ 'x'.encode('ascii') }}
{{ a.b.c }}"""

# Refuse a tokenizer whose output is longer than this multiple of the input.
_MAX_GROWTH = 16
# ASCII; scripts of one to four UTF-8 bytes per character; runs, which make some regular expressions quadratic.
_SAMPLE = (
    "".join(map(chr, range(32, 127)))
    + " The quick brown fox jumps over the lazy dog.\n\tÄpfel, naïve œuvre; Ελλάδα, Привет,  שלום, مرحبا, हिन्दी, ไทย, "
    + "日本語, 한국어, 🙂👩\u200d👩\u200d👧 ﬁ ① Ａ \u0301\u00a0\ufeff\u0000"
    + "".join(char * count for char, count in {"a": 500, " ": 200, "\n": 50, "1": 100, "=": 100}.items())
)

Answer = tuple[str, int, str]


def max_text(request: int) -> int:
    """Longest text in a reply to a request of `request` bytes."""
    return (1 << 20) + 8 * request


def give_up(memory: int) -> None:
    """Drop privileges for good: no new files, sockets or processes, no environment, at most `memory` bytes.

    Only what a template that escaped Jinja's sandbox could use; open descriptors stay open. Root could raise the limits
    again, so it becomes nobody.
    """
    os.environ.clear()
    with contextlib.suppress(ImportError):  # no rlimits on this platform
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
    """Let the kernel kill this process after `seconds` more of CPU time, even if the parent is gone."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, most))


def renderer() -> Callable[[str, str, dict[str, Any]], Answer]:
    """Set Jinja up as transformers does, and return `render(source, local time in ISO 8601, variables)`.

    Errors become replies, except MemoryError, after which the process should not go on.
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
        """The template called `raise_exception`."""

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks assistant text for training masks; for inference, render its body."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's interface

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("inside"), [], [], body, lineno=line)

        def inside(self, caller: Macro) -> str:
            return caller()

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
            raise SecurityError(f"it accesses {attribute!r} of a {type(obj).__name__}")

    def refuse(message: object = "") -> None:
        raise RefusedError(str(message).strip() or "no reason given")

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
            reason = (
                "it nests too deeply" if isinstance(error, RecursionError) else getattr(error, "message", str(error))
            )
            line = error.lineno if isinstance(error, TemplateSyntaxError) else _line_of(error)
            return kind, line, (reason or type(error).__name__)[:_MAX_REASON]

    return render


def trier() -> Callable[[str], Answer]:
    """Return a function that checks that a tokenizer does not blow a short text up.

    An unreadable tokenizer passes: the parent loads it next and reports the error.
    """
    from tokenizers import Tokenizer

    def sizes(tokenizer: Any, text: str) -> Iterator[int]:
        """Characters or tokens after each step of encoding and decoding. Lazy: stop before a step grows further."""
        normalizer, splitter = tokenizer.normalizer, tokenizer.pre_tokenizer
        normalized = normalizer.normalize_str(text) if normalizer else text
        yield len(normalized)
        yield sum(len(piece) for piece, _ in splitter.pre_tokenize_str(normalized)) if splitter else 0
        ids = tokenizer.encode(text, add_special_tokens=True).ids
        yield len(ids)
        yield len(tokenizer.decode(ids, skip_special_tokens=False))

    def attempt(request: str) -> Answer:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # RLIMIT_NPROC forbids threads
        try:
            tokenizer = Tokenizer.from_str(request)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            # Add every character in the normalizer's and pre-tokenizer's patterns: what they expand must be tested.
            parts = filter(None, (tokenizer.normalizer, tokenizer.pre_tokenizer))
            text = _SAMPLE + "".join(sorted({char for part in parts for char in part.__getstate__().decode()}))
            size = next((size for size in sizes(tokenizer, text) if size > _MAX_GROWTH * len(text)), 0)
        except Exception:
            return TEXT, 0, ""
        said = f"it turns a text of {len(text):,} characters into {size:,} characters or tokens"
        return (STOPPED, 0, said) if size else (TEXT, 0, "")

    return attempt


def _line_of(error: BaseException) -> int:
    """The template's line, from the traceback that Jinja rewrites; 0 if it has none."""
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
    """Serve requests on stdin; `cpu_seconds` for each, `memory` bytes in all."""
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
                kind, line, text = SPENT, 0, "its output is too long"
            _reply(kind, line, text)
        except MemoryError as error:
            # The heap may stay full, so the parent replaces this process after a SPENT reply.
            _reply(SPENT, _line_of(error), "it uses too much memory")
        except Exception as error:  # for example text that cannot be encoded
            _reply(FAILED, 0, type(error).__name__)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
