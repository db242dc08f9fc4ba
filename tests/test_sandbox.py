"""The sandbox of chat templates: what attacks ends in an error, and what is honest renders as Jinja renders it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hostile_templates import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from exl_cli.errors import PromptError
from exl_cli.models.chat_template import ChatTemplate

SECONDS = 4.0  # of processor time; it takes one on an idle machine


@pytest.fixture(scope="module")
def outcomes():
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hostile_templates.py"))],
        env={"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout)


@pytest.mark.parametrize("name", HOSTILE)
def test_an_attack_ends_in_an_error(outcomes, name):
    outcome, seconds = outcomes[name]
    assert outcome.startswith("refused: the model's chat template ")
    assert "MemoryError" not in outcome
    assert seconds < SECONDS


def render(template, **extra):
    return ChatTemplate(template).render([{"role": "user", "content": "hi"}], extra=extra)


def test_a_spent_allowance_is_not_spent_again():
    ones = "{% set x = 'a' * 90000000 %}{{ x|length }}"
    assert render(ones) == render(ones) == "90000000"
    with pytest.raises(PromptError):
        render(ones + "{% set y = x ~ x %}")
    assert render(ones) == "90000000"


def test_the_text_is_at_most_some_times_as_long_as_what_is_given():
    assert len(render("{{ 'x' * 1000000 }}")) == 1_000_000
    with pytest.raises(PromptError, match="it writes too much text"):
        render("{{ 'x' * 2000000 }}")
    assert len(render("{{ given * 2 }}", given="x" * 2_000_000)) == 4_000_000


def test_nothing_leads_from_a_template_to_what_it_was_given():
    given_to_it = {"deep": {"list": [1]}}
    with pytest.raises(PromptError):
        render("{{ deep.list.append(2) }}", **given_to_it)
    assert render("{% set deep = {} %}{{ deep }}", **given_to_it) == "{}"
    assert given_to_it == {"deep": {"list": [1]}}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ {'_x': 1, '__class__': 2}['__class__'] }}", "2"),
        ("{{ {'items': 5}['items'] }}{{ {'items': 5}.items() }}", "5[('items', 5)]"),
        ("{{ raise_exception }}", "<function>"),
        ("{% if false %}{{ 'x'|wordwrap(3) }}{% endif %}fine", "fine"),
        ("{{ 1 < 2 < 3 }}{{ 3 > 2 > 2 }}", "TrueFalse"),
        ("{{ '{} {b} {{}}'.format(1, b='x') }}", "1 x {}"),
        ("{{ (', '|safe).join(['<', 1]) }}{{ ['<', 1]|join(', '|safe) }}", "&lt;, 1<, 1"),
        ("{{ ''.format() ~ '' }}", ""),
        ("{{ '%s is %5.1f%%' % ('it', 2) }}", "it is   2.0%"),
    ],
)
def test_what_is_harmless_is_rendered(template, text):
    assert render(template) == text


# -- Any template, against Jinja as transformers sets it up ------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b>, é."},
    {"role": "user", "content": " a </think> b\nc ", "n": 3, "tags": ["x", "y"]},
    {"role": "assistant", "content": "ok"},
]


def one_of(words, separator=" "):
    return st.sampled_from(words.split(separator))


ATOMS = one_of(
    "messages|messages[1]['content']|messages[-1].role|messages[1].tags|'abc'|' '|3|0|2.5|none|true|nothing|[1, 2, 3]|"
    "['b', 'A', 'a']|{'k': 'v', 'n': 2}|(1, 'x')|range(4)|x|ns.v|'<'~'&'|[[1, 2], ['a']]|'a.b.c'",
    "|",
)
OPERATORS = one_of("+ - * / // % ~ == != < <= > >= in and or")
FILTERS = one_of(
    "trim upper lower title capitalize length first last list string tojson tojson(indent=2) default('d') join "
    "join('-') replace('a','bb') sort sort(reverse=true) sort(attribute='role') unique|list reverse|list "
    "map('upper')|list map(attribute='role')|list select|list selectattr('role','eq','user')|list rejectattr('n')|list "
    "dictsort items|list int float round abs sum max min indent indent(2,true) safe e"
)
TESTS = one_of("defined none string mapping iterable sequence number true even eq(3) in([1,'abc'])")
METHODS = one_of(
    "strip() upper() split() split('.')[-1] rsplit('b',maxsplit=1) startswith('a') replace('a','z') find('b') "
    "join(['a']) splitlines() get('k') get('zz',5) items()|list index(1) isdigit() nope() role content n"
)
INDICES = one_of("0 -1 'content' 'k' 'items' 9 x")
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, OPERATORS, inner),
        st.builds("({})|{}".format, inner, FILTERS),
        st.builds("(({}) is {})".format, inner, TESTS),
        st.builds("({}).{}".format, inner, METHODS),
        st.builds("({})[{}]".format, inner, INDICES),
        st.builds("(x ~ {})[1:]".format, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("(not {})".format, inner),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("m({})".format, inner),
    ),
    max_leaves=4,
)
OUTPUTS = st.builds("{{{{ {} }}}}|".format, EXPRESSIONS)
TEMPLATES = st.recursive(
    OUTPUTS,
    lambda inner: st.one_of(
        st.builds("{{% for x in {} %}}{}{{{{ loop.index ~ loop.last }}}}{{% endfor %}}\n".format, EXPRESSIONS, inner),
        st.builds("{{% for x in {} if {} %}}{}{{% else %}}-{{% endfor %}}".format, EXPRESSIONS, EXPRESSIONS, inner),
        st.builds("{{% if {} -%}} {} {{% else %}}{}{{%- endif %}}\n".format, EXPRESSIONS, inner, inner),
        st.builds("{{% set {} = {} %}}{}".format, st.sampled_from(["x", "ns.v", "a, b"]), EXPRESSIONS, inner),
        st.builds("{{% set x %}}{}{{% endset %}}{{{{ x }}}}".format, inner),
        st.builds("{{% macro k(x, y={}) %}}{}{{{{ x }}}}{{% endmacro %}}{{{{ k(1) }}}}".format, EXPRESSIONS, inner),
        st.builds("{{% call m(1) %}}{}{{% endcall %}}{{% generation %}}{}{{% endgeneration %}}".format, inner, inner),
        st.builds("{}{}".format, inner, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(TEMPLATES)
def test_any_template_renders_as_in_transformers(template):
    template = "{% set ns = namespace(v=1) %}{% macro m(x) %}<{{ x }}>{% endmacro %}\n" + template
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's about code that Jinja writes, such as `3[0]`
            (want,), _ = render_jinja_template([MESSAGES], chat_template=template)
    except Exception:
        want = None
    if want is None:
        with pytest.raises(PromptError):
            ChatTemplate(template).render(MESSAGES, add_generation_prompt=False)
    elif len(want) < 10_000 and " at 0x" not in want:  # not too long, and no object of Python's with its address
        assert ChatTemplate(template).render(MESSAGES, add_generation_prompt=False) == want
