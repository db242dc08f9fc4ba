"""The `exl` command, and `python -m exl_cli`."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def _end(signum: int, frame: FrameType | None) -> None:
    os._exit(130)


def main() -> NoReturn:
    """Run the command and exit; Ctrl-C never shows a traceback, not even during the first imports."""
    # Until the CLI is imported there is nothing to clean up and no error boundary: SIGINT exits at once.
    waiting = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waiting:
        signal.signal(signal.SIGINT, _end)
    from exl_cli.cli.app import main as command
    from exl_cli.system.processes import leave

    code = 130
    try:
        if waiting:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = command()
    except KeyboardInterrupt:
        pass
    except Exception:
        code = 1
        sys.excepthook(*sys.exc_info())
    leave(code)


if __name__ == "__main__":
    main()
