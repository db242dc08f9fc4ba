"""Chat templates that attack: each must end in a `PromptError`. Run as a program, this file tries them all.

That process runs under a memory limit, so that a regression fails in it instead of taking the machine along.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from exl_cli.errors import PromptError
from exl_cli.models.chat_template import ChatTemplate

MEMORY = 512 << 20
PYTHON = {
    "class": "{{ ''.__class__ }}",
    "class by item": "{{ ''['__class__'] }}",
    "class of an integer": "{{ (5).__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of range": "{{ range.__globals__ }}",
    "wrapped function": "{{ raise_exception.run }}{{ 1/0 }}",
    "self of a method": "{{ ''.join.__self__ }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "joiner": "{{ joiner.__init__ }}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "lipsum called": "{{ lipsum(5) }}",
    "self": "{{ self.__init__.__globals__ }}",
    "self's context": "{{ self._TemplateReference__context }}",
    "undefined": "{{ x.__class__.__mro__ }}",
    "namespace": "{{ namespace.__init__ }}",
    "namespace's class": "{% set ns = namespace() %}{{ ns.__class__ }}",
    "namespace's insides": "{% set ns = namespace() %}{{ ns._Namespace__attrs }}",
    "namespace's class set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "namespace with class": "{{ namespace(__class__=1) }}",
    "dict": "{{ dict.mro() }}",
    "attr": "{{ ''|attr('__class__') }}",
    "map": "{{ ['']|map(attribute='__class__')|list }}",
    "selectattr": "{{ ['']|selectattr('__class__')|list }}",
    "join": "{{ ['']|join(attribute='__class__') }}",
    "sum": "{{ ['']|sum(attribute='__class__') }}",
    "sort": "{{ ['a', 'b']|sort(attribute='__class__') }}",
    "round": "{{ 1.5|round(2, '__class__') }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "format item": "{{ '{0[__class__]}'.format('') }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "format as value": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "caller": "{% macro f() %}{{ caller.__globals__ }}{% endmacro %}{% call f() %}{% endcall %}",
    "loop": "{% for i in [1] %}{{ loop._iterable }}{% endfor %}",
    "loop's method": "{% for i in [1] %}{{ loop.cycle.__globals__ }}{% endfor %}",
    "generator": "{{ ([1]|map('string')).gi_frame }}",
    "list method": "{{ [].append(1) }}",
    "dict method": "{{ {}.update({1: 2}) }}",
    "environment": "{{ environment.toll }}",
    "context": "{{ context.environment }}",
    "resolve": "{{ resolve('x') }}",
    "eval": "{{ eval('1') }}",
    "text called": "{{ 'x'() }}",
    "import": "{% import 'os' as os %}",
    "from": "{% from 'os' import system %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block a %}{% endblock %}",
    "do": "{% do 1 %}",
    "autoescape": "{% autoescape true %}{% endautoescape %}",
    "escapes of a terminal": "{{ raise_exception('\x1b[2J') }}",
}

START = "{% set ns = namespace(x=START) %}"
TWICE = "{% for i in range(100000) %}{% for j in range(100000) %}BODY{% endfor %}{% endfor %}"


def loop(body: str, start: str = "''") -> str:
    return START.replace("START", start) + "{% for i in range(100000) %}" + body + "{% endfor %}"


def loops(body: str, start: str = "''") -> str:
    return START.replace("START", start) + TWICE.replace("BODY", body)


SIZE = {
    "text times": "{{ 'a' * 10**10 }}",
    "times text": "{{ 99999999999 * 'x' }}",
    "text times twice": "{{ 'x' * 99999 * 99999 }}",
    "list times": "{{ ([0] * 10**9)|length }}",
    "tuple times": "{{ (0,) * 10**9 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": loop("{% set ns.x = ns.x * ns.x %}", "3"),
    "sums": loop("{% set ns.x = ns.x + ns.x %}", "3"),
    "number read": "{{ ('9' * 100000000)|int }}",
    "float read": "{{ ('9' * 100000000)|float }}",
    "number in another base": "{{ ('f' * 1000)|int(0, 16) }}",
    "rounded": "{{ 1.5|round(10**9, 'ceil') }}",
    "rounded text": "{{ 'x'|round(9, 'ceil') }}",
    "percent": "{{ '%0999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent float": "{{ '%.999999999f' % 1 }}",
    "percent in a test": "{{ '%0999999999d' is odd }}",
    "percent in another": "{{ '%0999999999d' is divisibleby(3) }}",
    "format filter": "{{ '%0999999999d'|format(1) }}",
    "format width": "{{ '{:>999999999}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 999999999) }}",
    "center": "{{ 'x'|center(10**9) }}",
    "center method": "{{ 'x'.center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "batch": "{{ range(100000)|batch(10**9, 'x')|list }}",
    "wordwrap": "{{ ('a ' * 9999999)|wordwrap(1, wrapstring='x' * 999999) }}",
    "list of a range": "{{ range(10**8)|list }}",
    "list of text": "{{ ('a' * 50000000)|list|length }}",
    "replace": "{{ ('a' * 10000000)|replace('a', 'b' * 100) }}",
    "replace nothing": "{{ ('a' * 1000000).replace('', 'b' * 100000) }}",
    "indent": "{{ ('\n' * 1000000)|indent(10**6) }}",
    "indent by text": "{{ 'x\ny'|indent('x' * 10**7) }}",
    "join": "{{ range(100000)|join('x' * 100000) }}",
    "join method": "{{ ('x' * 100000).join(['a'] * 100000) }}",
    "split": "{{ ('a ' * 30000000).split()|length }}",
    "split at": "{{ ('a,' * 30000000).split(',')|length }}",
    "splitlines": "{{ ('\n' * 10000000).splitlines()|length }}",
    "escape": "{{ ('&' * 30000000)|e }}",
    "markup": loop("{% set ns.x = ns.x + '&&&&' + ns.x %}", "'&'|safe"),
    "markup joined": "{{ ('x'|safe).join(['&' * 10000000] * 5) }}",
    "markup replaced": "{{ ('x' * 1000000|safe).replace('x', '&' * 1000) }}",
    "tilde": loop("{% set ns.x = ns.x ~ ns.x %}", "'ab'"),
    "plus": loop("{% set ns.x = ns.x + ns.x %}", "'ab'"),
    "list plus": loop("{% set ns.x = ns.x + ns.x %}", "[1]"),
    "block set": loop("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}", "'ab'"),
    "kept": loop("{% set ns.x = ns.x + [i ~ '" + "x" * 5000 + "'] %}", "[]"),
    "literal text": "{% for i in range(100000) %}" + "x" * 50000 + "{% endfor %}",
    "text of a macro": "{% macro f() %}" + "x" * 50000 + "{% endmacro %}" + loop("{% set y = f() %}"),
    "JSON indent": "{{ ([[1] * 100] * 100)|tojson(indent=999999) }}",
    "JSON indent by text": "{{ ([1] * 100000)|tojson(indent='x' * 1000000) }}",
    "JSON separators": "{{ ([1] * 100000)|tojson(separators=['x' * 1000000, ':']) }}",
    "summed lists": "{{ ([[1] * 1000] * 10000)|sum(start=[])|length }}",
    "arguments": "{% macro f() %}{{ varargs }}{% endmacro %}" + loop("{{ f(*range(100000)) }}"),
    "date": "{{ strftime_now('%0999999999d') }}",
    "long date": "{{ strftime_now('%c' * 10000000) }}",
    "raised": "{{ raise_exception('x' * 10**10) }}",
}
TIME = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested": loops(""),
    "nested three deep": "{% for h in range(100000) %}" + loops("x") + "{% endfor %}",
    "nested, nothing chosen": loop("{% for j in range(100000) if false %}{% endfor %}"),
    "macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "macro, two ways": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "caller": "{% macro f(n) %}{{ caller() }}{% if n %}{% call f(n-1) %}{{ caller() }}{{ caller() }}{% endcall %}"
    "{% endif %}{% endmacro %}{% call f(90) %}x{% endcall %}",
    "recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "characters": "{% for c in 'a' * 100000000 %}{% endfor %}",
    "mapped": loop("{% set a = range(100000)|map(attribute='a.a.a')|list %}"),
    "mapped by a long path": loop("{% set a = range(100000)|map(attribute='a" + ".a" * 99 + "')|list %}"),
    "reversed length": loop("{% for j in range(100000)|reverse %}{% set x = loop.length %}{% break %}{% endfor %}"),
    "compared": "{% set a = 'x' * 9000000 %}{% set b = a ~ '' %}" + loop("{% if a == b %}{% endif %}"),
    "searched": "{% set a = 'a' * 29999 %}{% set b = 'a' * 98 ~ 'b' %}" + loop("{% if b in a %}{% endif %}"),
    "searched backwards": "{% set a = 'a' * 1000000 %}{{ a.rfind('b' ~ 'a' * 500000) }}",
    "stripped": "{% set a = 'a' * 1000000 %}" + loop("{% set b = a.strip('b' * 100000 ~ 'a') %}"),
    "upper": "{% set a = 'ß' * 1000000 %}" + loop("{% set b = a.upper() %}"),
    "title": "{% set a = 'ß ' * 1000000 %}" + loop("{% set b = a|title %}"),
    "sliced": "{% set a = 'x' * 1000000 %}" + loop("{% set b = a[::-1] %}"),
    "sorted": loop("{% set a = range(100000)|sort %}"),
    "found in a list": "{% set a = [1] * 1000000 %}" + loop("{% set b = 2 in a %}"),
    "index": "{% set a = [1] * 1000000 + [2] %}" + loop("{% set b = a.index(2) %}"),
    "JSON": "{% set a = '\x01' * 1000000 %}" + loop("{% set b = a|tojson %}"),
}
# Sixty steps build a value that takes 2**60 to write, compare or hash.
SHARED = "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
SHARED_TUPLE = SHARED.replace("[ns.x, ns.x]", "(ns.x, ns.x)")
SHARED_USES = {
    **{use: SHARED + "{{ " + use + " }}" for use in ("ns.x", "ns.x|tojson", "ns.x ~ ''", "ns.x|upper", "[ns.x]|join")},
    **{use: SHARED + "{{ " + use + " }}" for use in ("'%s' % (ns.x,)", "'{}'.format(ns.x)", "raise_exception(ns.x)")},
    **{use: SHARED + "{{ " + use + " }}" for use in ("[ns.x].index([ns.x])", "[ns.x, [ns.x]]|sort", "ns.x == [ns.x]")},
    **{use: SHARED_TUPLE + "{{ " + use + " }}" for use in ("{ns.x: 1}", "{}[ns.x]", "{}.get(ns.x)", "ns.x in {}")},
    **{use: SHARED_TUPLE + "{{ " + use + " }}" for use in ("[ns.x]|unique|list", "dict([(ns.x, 1)])")},
    **{use: SHARED_TUPLE + "{{ " + use + " }}" for use in ("[1]|map(ns.x)|list", "[1]|select(ns.x)|list")},
}
DEEP = {
    "list": loop("{% set ns.x = [ns.x] %}") + "{{ ns.x }}",
    "tuple": loop("{% set ns.x = (ns.x,) %}") + "{{ {ns.x: 1} }}",
    "dict as JSON": loop("{% set ns.x = {'a': ns.x} %}") + "{{ ns.x|tojson(indent=1) }}",
    "generators": loop("{% set ns.x = ns.x|map('string') %}", "[1]") + "{{ 1/0 }}",
    "loops": "{% set ns = namespace(x=range(3)) %}{% for i in range(100000) %}{% for j in ns.x %}{% set ns.x = loop %}"
    "{% break %}{% endfor %}{% endfor %}{{ 1/0 }}",
}
SOURCE = {
    "long": "x" * 2_000_000,
    "many nodes": "{{a}}" * 20_000,
    "parentheses": "{{ " + "(" * 40_000,
    "lists": "{{ " + "[" * 40_000 + "]" * 40_000 + " }}",
    "minus": "{{ " + "-" * 40_000 + "1 }}",
    "dots": "{{ a" + ".b" * 40_000 + " }}",
    "sum": "{{ 1" + "+1" * 9_000 + " }}",
    "ifs": "{% if a %}" * 5_000 + "{% endif %}" * 5_000,
    "elifs": "{% if 0 %}" + "{% elif 0 %}" * 4_000 + "{% endif %}{{ 1/0 }}",
    "fors": "{% for i in a %}" * 500 + "{% endfor %}" * 500,
    "unfinished": "{%" * 50_000,
    "unfinished comment": "{# " + "-" * 90_000,
    "unfinished raw": "{% raw %}" + "{%" + " " * 90_000,
    "spaces": "{%" + " " * 99_000,
    "digits": "{{ " + "9" * 90_000 + " }}",
}
GROUPS = {
    "python": PYTHON,
    "size": SIZE,
    "time": TIME,
    "shared": SHARED_USES,
    "deep": DEEP,
    "source": SOURCE,
}
HOSTILE = {f"{group}: {name}": template for group, table in GROUPS.items() for name, template in table.items()}


def attack(template: str) -> tuple[str, float]:
    """What became of it, and the seconds of processor time that it took."""
    start = time.process_time()
    try:
        outcome = "rendered " + repr(ChatTemplate(template).render([{"role": "user", "content": "hi"}])[:80])
    except PromptError as error:
        outcome = f"refused: {error.message}"
    except BaseException as error:
        outcome = f"escaped: {error!r}"[:200]
    return outcome, time.process_time() - start


if __name__ == "__main__":
    attack("imports")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    json.dump({name: attack(template) for name, template in HOSTILE.items()}, sys.stdout)
