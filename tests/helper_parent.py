"""A program with a template helper that ends in the way its argument names."""

import os
import signal
import sys

from exl_cli.models.template_helper import Helper

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

if __name__ == "__main__":
    helper = Helper(deadline=1)
    helper.render("x", {})
    sys.stdout.write(f"{helper.pid}\n")
    sys.stdout.flush()
    sys.stdin.readline()
    if sys.argv[1] == "left":
        os._exit(0)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    helper.render(ENDLESS, {})
