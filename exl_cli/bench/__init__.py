"""Benchmarks: what to measure, how, and what to say of it.

| module | holds |
|---|---|
| `task` | what the user asked for, checked, as jobs |
| `plan` | the tests of a run, their order, their prompts |
| `measure` | one repetition of one test, through the engine's stream |
| `job`, `worker` | what a process is asked to do; a model with a cache type, from import to the last test |
| `runner` | the run as a whole: workers started, their events collected, interruptions |
| `result`, `files` | what a run found and its statistics; its JSON (`schema.json` is the published schema) |
| `saving` | results in files |
| `limits` | what the hardware allows, and what holds a test back |
| `environment`, `nvml` | the machine; the GPUs while it runs |
| `perplexity` | the quality beside the speed |
| `compare` | two results side by side, with a test of significance |
| `outputs` | Markdown, CSV, JSON lines |
| `html`, `style`, `charts`, `bars`, `drawing` | the report |

Nothing here sees a tensor: `engines.probe` and `engines.scoring` do.
"""
