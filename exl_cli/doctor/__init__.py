"""`exl doctor`: checks of everything between a user and the first token.

The checks (`machine`, `gpu`, `extension`, `model`) import nothing heavy: each risky question is a function of `probes`
that runs in a child process with a time limit: a crash or a hang is a result like any other. `doctor` puts the
checks in order and draws the conclusion.
"""
