"""`python -m exl_cli`."""

from exl_cli.cli import main

main()
