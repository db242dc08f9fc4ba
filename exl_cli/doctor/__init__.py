"""`exl doctor`: check everything between the user and the first token.

The checks (`machine`, `gpu`, `extension`, `model`) import nothing heavy. Anything that may crash or hang is a function
in `probes` that runs in a child process with a time limit. `doctor` orders the checks and draws the conclusion.
"""
