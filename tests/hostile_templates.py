"""Chat templates that attack: each must end in a `PromptError`, within 5 seconds and 512 MB.

As a program it renders them all and prints what the slowest takes.
"""

from __future__ import annotations

import contextlib
import sys
import time

from exl_cli.errors import PromptError
from exl_cli.models.chat_template import ChatTemplate
from exl_cli.models.template_helper import Helper

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
    "self": "{{ self.__init__.__globals__ }}",
    "self's context": "{{ self._TemplateReference__context }}",
    "undefined": "{{ x.__class__.__mro__ }}",
    "namespace": "{{ namespace.__init__ }}",
    "namespace's class": "{% set ns = namespace() %}{{ ns.__class__ }}",
    "namespace's insides": "{% set ns = namespace() %}{{ ns._Namespace__attrs }}",
    "namespace's function": "{% set ns = namespace(f=range) %}{{ ns.f.__globals__ }}",
    "dict's class": "{{ dict.__class__ }}",
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
    "do": "{% do 1 %}",
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
    "list times": "{{ ([0] * 10**9)|length }}",
    "tuple times": "{{ (0,) * 10**9 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": loop("{% set ns.x = ns.x * ns.x %}", "3"),
    "sums": loop("{% set ns.x = ns.x + ns.x %}", "3"),
    "rounded": "{{ 1.5|round(10**9, 'ceil') }}",
    "percent": "{{ '%0999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent float": "{{ '%.999999999f' % 1 }}",
    "format width": "{{ '{:>999999999}'.format(1) }}",
    "center": "{{ 'x'|center(10**9) }}",
    "batch": "{{ range(100000)|batch(10**9, 'x')|list }}",
    "wordwrap": "{{ ('a ' * 9999999)|wordwrap(1, wrapstring='x' * 999999) }}",
    "list of a range": "{{ range(10**8)|list }}",
    "replace": "{{ ('a' * 10000000)|replace('a', 'b' * 100) }}",
    "join": "{{ range(100000)|join('x' * 100000) }}",
    "split": "{{ ('a ' * 30000000).split()|length }}",
    "tilde": loop("{% set ns.x = ns.x ~ ns.x %}", "'ab'"),
    "block set": loop("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}", "'ab'"),
    "kept": loop("{% set ns.x = ns.x + [i ~ '" + "x" * 5000 + "'] %}", "[]"),
    "literal text": "{% for i in range(100000) %}" + "x" * 50000 + "{% endfor %}",
    "JSON indent": "{{ ([[1] * 100] * 100)|tojson(indent=999999) }}",
    "JSON separators": "{{ ([1] * 100000)|tojson(separators=['x' * 1000000, ':']) }}",
    "arguments": "{% macro f() %}{{ varargs }}{% endmacro %}" + loop("{{ f(*range(100000)) }}"),
    "raised": "{{ raise_exception('x' * 10**10) }}",
}
TIME = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested three deep": "{% for h in range(100000) %}" + loops("x") + "{% endfor %}",
    "nested, nothing chosen": loop("{% for j in range(100000) if false %}{% endfor %}"),
    "macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "macro, two ways": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "caller": "{% macro f(n) %}{{ caller() }}{% if n %}{% call f(n-1) %}{{ caller() }}{{ caller() }}{% endcall %}"
    "{% endif %}{% endmacro %}{% call f(90) %}x{% endcall %}",
    "recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "characters": "{% for c in 'a' * 100000000 %}{% endfor %}",
    "compared": "{% set a = 'x' * 9000000 %}{% set b = a ~ '' %}" + loop("{% if a == b %}{% endif %}"),
    "searched": "{% set a = 'a' * 29999 %}{% set b = 'a' * 98 ~ 'b' %}" + loop("{% if b in a %}{% endif %}"),
    "upper": "{% set a = 'ß' * 1000000 %}" + loop("{% set b = a.upper() %}"),
    "sorted": loop("{% set a = range(100000)|sort %}"),
    "index": "{% set a = [1] * 1000000 + [2] %}" + loop("{% set b = a.index(2) %}"),
}
# Sixty steps build a value that takes 2**60 to write, compare or hash.
SHARED = "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
SHARED_TUPLE = SHARED.replace("[ns.x, ns.x]", "(ns.x, ns.x)")
SHARED_USES = {
    **{
        use: SHARED + "{{ " + use + " }}"
        for use in ("ns.x", "ns.x|tojson", "'{}'.format(ns.x)", "raise_exception(ns.x)")
    },
    **{use: SHARED_TUPLE + "{{ " + use + " }}" for use in ("{ns.x: 1}", "[ns.x]|unique|list", "[1]|select(ns.x)|list")},
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
# What a meter of ours once let pass: integers that hash alike, a search that looks cheap, copies that are all kept, and
# an error whose text holds a value.
UNMETERED = {
    "alike": "{{ range(0, 100000*2305843009213693951, 2305843009213693951)|unique|list|length }}",
    "searches": "{% for i in range(100000) %}{% if [] in range(100000) %}{% endif %}{% endfor %}",
    "copies": loop("{% set ns.x = ns.x + [large.copy()] %}", "[]"),
    "the error's text": "{% set k='x'*28000000 %}{{ {}[k]+1 }}{{ {}[k*9]+1 }}",
}
GROUPS = {
    **{"python": PYTHON, "size": SIZE, "time": TIME, "shared": SHARED_USES, "deep": DEEP, "source": SOURCE},
    "unmetered": UNMETERED,
}
HOSTILE = {f"{group}: {name}": template for group, table in GROUPS.items() for name, template in table.items()}

LARGE = {"large": {str(i): i for i in range(1000)}}

if __name__ == "__main__":
    helper, slowest = Helper(), (0.0, "")
    for name, template in HOSTILE.items():
        began = time.perf_counter()
        with contextlib.suppress(PromptError):
            ChatTemplate(template, helper=helper).render([{"role": "user", "content": "hi"}], extra=LARGE)
        slowest = max(slowest, (time.perf_counter() - began, name))
    sys.stdout.write(f"{len(HOSTILE)} templates, the slowest {slowest[0]:.2f} s: {slowest[1]}\n")
