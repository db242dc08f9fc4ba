"""Benchmarks: what to measure, how, and what to say of it.

| module | holds |
|---|---|
| `plan` | settings, the tests of a run, their order and prompts; a process's job |
| `runner` | the run as a whole, and the process that measures a model with a cache type |
| `measure` | one repetition of one test, through the engine's stream; the quality beside the speed |
| `machine` | the machine, and its GPUs while they work |
| `result`, `limits` | the records and their statistics; what the hardware allows, and what holds a test back |
| `outputs` | JSON and back (`schema.json` is the published schema), JSON lines, CSV, Markdown, files |
| `compare` | two results side by side, with a test of significance |
| `report` | the HTML report and its charts |

Nothing here sees a tensor: `engines.probe` and `engines.scoring` do.
"""
