"""The `exl` command, and `python -m exl_cli`."""

import os
import signal
import sys
from types import FrameType


def _end(signum: int, frame: FrameType | None) -> None:
    os._exit(130)


def main() -> None:
    """Run the command; Ctrl-C ends it without a traceback from the very first moment on."""
    # While the first modules are imported there is nothing to lose, nor to say, and no one yet who would catch it.
    waiting = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waiting:
        signal.signal(signal.SIGINT, _end)
    from exl_cli.cli.app import main as command

    try:
        if waiting:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
