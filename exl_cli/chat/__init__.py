"""`exl chat`: a conversation in a terminal or through a pipe.

- `conversation`: lines in, answers out, all of it kept; what goes when the context is full.
- `session`: the turns, their file, the folder of files, writing them for other programs.
- `commands`: the table of slash commands, which dispatch, help and completion read.
- `settings`: what can be set.
- `model`, `prompt_encoder`: the model talked to; a prompt's text as the token ids that its engine already has.
- `view`: the interface that `ui.chat` implements.
"""
