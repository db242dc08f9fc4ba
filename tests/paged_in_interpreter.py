"""Run the Triton kernels on the CPU, in Triton's interpreter, and print each case's error as JSON.

A program of its own because Triton reads TRITON_INTERPRET once, when it is imported. Cases are small: the interpreter
takes milliseconds for each operation of a program.
"""

from __future__ import annotations

import json
import sys

from pagedcases import Built, Case

CASES = {
    "one token": Case((300,), heads=4, kv_heads=1, dim=64),
    "one token, its key in the cache already": Case((130,), heads=2, kv_heads=1, dim=64, fresh=False),
    "lengths at the borders of blocks and pages": Case((1, 64, 65, 256, 257), heads=2, kv_heads=1, dim=64),
    "grouped, a few tokens, window": Case((300, 261), 5, heads=4, dim=96, window=70),
    "window smaller than the tokens, multi-query": Case((300, 16), 16, heads=4, kv_heads=1, dim=80, window=4),
    "seven queries a key, softcap": Case((258,), 3, heads=7, kv_heads=1, dim=256, softcap=30.0),
    "queries on both sides of a block's last key": Case((128,), 2, heads=2, kv_heads=1, dim=64, fresh=False),
    "several tokens in shares": Case((330, 20), 4, heads=2, kv_heads=1, dim=64, fresh=False),
    "fewer shares than programs": Case((330, 70), heads=4, kv_heads=1, dim=64),
    "more shares than are merged at once": Case((1088,), heads=2, kv_heads=1, dim=64, seed=5),
    "window that begins within a block": Case((600,), heads=2, kv_heads=1, dim=64, window=100),
    "window that begins with a block's last key": Case((200,), heads=2, kv_heads=1, dim=64, window=73),
    "window of one key": Case((300,), heads=2, kv_heads=1, dim=64, window=1),
    "first prompt": Case((130,), 130, heads=2, kv_heads=1, dim=64, fresh=False),
    "prompt with a past, split, onto a new page": Case((1034,), 20, heads=2, kv_heads=1, dim=64),
    "prompt whose averages are rounded up": Case(
        (90,), 90, heads=2, kv_heads=1, dim=64, softcap=1e4, fresh=False, rounds_up=True
    ),
    "shares whose averages are rounded up": Case((300,), 1, heads=2, kv_heads=1, dim=64, rounds_up=True),
    "prompts with pasts, window, softcap": Case((70, 300), 70, 2, 1, 64, window=33, softcap=20.0, fresh=False),
}

if __name__ == "__main__":
    from exl_cli.engines.exllamav2.attention import launch

    errors = {}
    for name, case in CASES.items():
        built = Built(case)
        errors[name] = built.check(launch.attend(built.call(max(case.lengths))))
    sys.stdout.write(json.dumps(errors))
