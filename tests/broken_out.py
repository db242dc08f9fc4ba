"""What a template could try after escaping from Jinja's sandbox into Python."""

import ctypes
import json
import os
import resource
import runpy
import socket
import subprocess
import sys
import threading
from pathlib import Path

worker = runpy.run_path(sys.argv[1])
worker["give_up"](512 << 20)
attempts = {
    "read": lambda: Path("/etc/passwd").read_bytes(),
    "write": lambda: Path(sys.argv[2]).touch(),
    "list": lambda: list(Path("/").iterdir()),
    "socket": socket.socket,
    "pipe": os.pipe,
    "import": lambda: __import__("sqlite3"),
    "fork": os.fork,
    "program": lambda: subprocess.run([sys.executable, "-c", "1"], check=True),
    "thread": lambda: threading.Thread(target=int).start(),
    "memory": lambda: bytearray(512 << 20),
    "more files": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9)),
    "more memory": lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)),
    "environment": lambda: os.environ["SECRET"],
}
outcome = {}
for name, attempt in attempts.items():
    try:
        outcome[name] = repr(attempt())
    except (OSError, MemoryError, KeyError, ValueError, ImportError, RuntimeError):
        outcome[name] = ""
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
outcome["libc's environment"] = (libc.getenv(b"SECRET") or b"").decode()
sys.stdout.write(json.dumps(outcome))
