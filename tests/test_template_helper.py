"""The sandboxed template helper: attacks end in one line and leave nothing behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from helper_parent import ENDLESS
from hostile_templates import HOSTILE, LARGE

from exl_cli.errors import ExitCode, PromptError
from exl_cli.models import template_worker
from exl_cli.models.chat_template import ChatTemplate, load_format
from exl_cli.models.template_helper import Helper

MESSAGES = [{"role": "user", "content": "hi"}]
HERE = Path(__file__).parent
HURRIED = Helper(deadline=0.1)  # what attacks time takes years: no need to wait seconds for it
HELPER = Helper()


def render(template, helper=HELPER, **extra):
    return ChatTemplate(template, helper=helper).render(MESSAGES, extra=extra)


def refusal(template, helper=HELPER, **extra):
    with pytest.raises(PromptError) as caught:
        render(template, helper, **extra)
    return caught.value


def has_ended(process):
    """Whether the process of this descriptor ends within 30 seconds."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(30_000))


# The system's limits end these, each with its process: a sixth of them shows that, `pytest -m slow` tries the others.
BOUNDED = [name for name in HOSTILE if name.startswith(("size", "time", "shared", "deep"))]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for index, name in enumerate(BOUNDED) if index % 6]


@pytest.mark.parametrize("name", [*[name for name in HOSTILE if name not in BOUNDED], *BOUNDED[::6], *SLOW])
def test_an_attack_ends_in_one_line(name):
    error = refusal(HOSTILE[name], HURRIED, **LARGE)
    assert error.exit_code == ExitCode.PROMPT
    assert error.message.startswith("the model's chat template ")
    assert error.message.isprintable()
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "was stopped: it took more than 0.5 seconds (chat_template.jinja)"),
        ("\n{{ 'a' * 10**10 }}", "was stopped: it uses too much memory"),
        ("{{ 'x' * 2000000 }}", "was stopped: its output is too long"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: it nests too deep"),
    ],
)
def test_the_next_rendering_is_right(template, message):
    helper = Helper(deadline=0.5)
    assert message in refusal(template, helper).message
    helper = helper if template != ENDLESS else HELPER
    assert render("{{ messages[0].content }}", helper) == "hi"
    assert len(render("{{ given * 2 }}", helper, given="x" * 600_000)) == 1_200_000  # text may grow with what is given


@pytest.mark.parametrize(
    "template",
    [
        "{{ {'_x': 1, '__class__': 2}['__class__'] }}{{ {'items': 5}['items'] }}{{ {'items': 5}.items() }}",
        "{{ 1 < 2 < 3 }}{{ '{} {b} {{}}'.format(1, b='x') }}{{ '%s is %5.1f%%' % ('it', 2) }}",
        "{{ (', '|safe).join(['<', '1']) }}{{ ['<', 1]|join(', '|safe) }}{{ '<'|e }}{{ 'ẞ'|upper }}",
        "{% for x in [1, 2, 3] %}{% if x == 1 %}{% continue %}{% endif %}{{ loop.index }}{% break %}{% endfor %}",
        "{% set ns = namespace(self=1, x=[2]) %}{% set ns.y = ns.x + [3] %}{{ ns.self }}{{ ns.y }}{{ dict(a=1) }}",
        "{% generation %}\n  {% set x = 1 %}a\n  {% endgeneration %}\n{{ x is defined }}\n{%- if 1 %}\n b{% endif %}",
        "{{ 'a b c'|wordwrap(3) }}{{ {'b': [1]}|pprint }}{{ 'a b'|urlencode }}{{ 1048576|filesizeformat }}",
        "{{ given|tojson }}{{ given|tojson(indent=2) }}{{ given.none is none }}{{ given.float }}{{ given }}",
        "{{ given|tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}{{ given.keys()|list }}",
        "{{ strftime_now('%Y-%m-%d %A %B') }}",
    ],
)
def test_a_template_renders_as_in_transformers(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {"z": "<é世\ud800>", "none": None, "list": [True, {"n": [-1, 10**30]}, []], "float": 0.1, "a": {}}
    (want,), _ = render_jinja_template([MESSAGES], chat_template=template, given=given)
    assert render(template, given=given) == want


def test_the_time_is_that_of_the_caller(monkeypatch):
    for zone in ("UTC+11", "UTC-14"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        said = datetime.strptime(render("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}"), "%Y-%m-%d %H:%M:%S")
        assert abs(said - datetime.now()) < timedelta(minutes=1)
    monkeypatch.undo()
    time.tzset()


def test_code_that_escapes_jinja_reaches_nothing(tmp_path):
    program = [str(HERE / "broken_out.py"), template_worker.__file__, str(tmp_path / "written")]
    command = [sys.executable, "-I", "-S", *program]
    done = subprocess.run(command, env={"SECRET": "x"}, capture_output=True, text=True, check=True, timeout=60)
    outcome = json.loads(done.stdout)
    assert len(outcome) == 14
    assert not any(outcome.values()), outcome


def test_the_process_has_no_environment_no_files_and_its_own_session(exl2_dir):
    assert load_format(exl2_dir).helper.pid  # it starts with the model's format
    helper = Helper()
    helper.start()
    pid, process = helper.pid, os.pidfd_open(helper.pid)
    assert render("x", helper) == "x"
    os.kill(pid, signal.SIGINT)  # as from a terminal
    assert render("x", helper) == "x"
    assert helper.pid == os.getsid(pid) == pid
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert {item.partition(b"=")[0] for item in environment.split(b"\0")} <= {b"", b"LC_CTYPE", b"LD_LIBRARY_PATH"}
    assert {file.name for file in Path(f"/proc/{pid}/fd").iterdir()} == {"0", "1", "2"}
    del helper
    assert has_ended(process)


# -- Ends and starts ---------------------------------------------------------------------------------------------------


def test_threads_take_turns():
    results = {}

    def work(number):
        results[number] = [render("{{ n }}-{{ m }}", n=number, m=i) for i in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [f"{number}-{i}" for i in range(5)] for number in range(64)}


def test_a_killed_process_starts_again():
    assert render("x") == "x"
    process = os.pidfd_open(HELPER.pid)
    os.kill(HELPER.pid, signal.SIGKILL)
    assert has_ended(process)
    assert render("y") == "y"


def test_an_interrupt_leaves_no_reply_to_be_taken_for_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            render(ENDLESS)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert render("y") == "y"


def test_a_forked_child_starts_its_own_helper():
    helper = Helper(deadline=1)
    holder = threading.Thread(target=refusal, args=(ENDLESS, helper))  # which holds the lock
    holder.start()
    while helper.pid is None:
        pass
    parents = helper.pid
    child = os.fork()
    if child == 0:
        fine = False
        try:
            fine = helper.pid is None and render("x", helper) == "x" and helper.pid != parents
        finally:
            os._exit(not fine)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    holder.join()


@pytest.mark.parametrize("end", ["left", "killed", "killed while it renders"])
def test_it_ends_with_its_parent(end):
    command = [sys.executable, str(HERE / "helper_parent.py"), end]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = os.pidfd_open(int(parent.stdout.readline()))
    parent.communicate("\n")
    assert has_ended(process)


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("/nonexistent/python", "failed: cannot start the helper process"),
        ("/bin/false", "failed: the helper process exited during startup"),
    ],
)
def test_a_python_that_does_not_start_is_reported(monkeypatch, python, said):
    monkeypatch.setattr(sys, "executable", python)
    assert said in refusal("x", Helper()).message
