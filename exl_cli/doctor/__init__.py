"""`exl doctor`: what of this machine stands between a user and the first token.

Nothing heavy is imported in the process that asks: each risky question is a probe (`probes`) in a child process with a
time limit (`child`), so that a crash or a hang is a finding like any other. The checks (`machine`, `gpu`, `compiled`,
`kernels`, `model`) turn answers into findings; `examine` puts them in order and draws the conclusion.
"""
