"""The `exl` command with a scripted engine, as a program: `python scripted_app.py ANSWER ARGS…`."""

import sys

from fakes import ScriptedLoader

from exl_cli.cli.app import app
from exl_cli.cli.options import State

app(sys.argv[2:], obj=State(load=ScriptedLoader(sys.argv[1])))
