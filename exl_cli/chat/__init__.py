"""`exl chat`: a conversation in a terminal or through a pipe.

- `conversation`: lines in, answers out; saving, and dropping old turns when the context is full.
- `session`: the turns, the session file, the folder of sessions, export.
- `commands`: the table of slash commands, which dispatch, help and completion read.
- `settings`: the values behind /set and /preset.
- `model`, `prompt_encoder`: the model, and the encoding of prompts that keeps its KV cache usable from turn to turn.
- `view`: the interface that `ui.chat` implements.
"""
