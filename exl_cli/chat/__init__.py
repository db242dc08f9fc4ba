"""`exl chat`: a conversation in a terminal or through a pipe.

- `loop`: the chat as a state machine. Lines and interrupts go in; it knows nothing of terminals.
- `conversation`, `prompting`: how something is said and answered; what the model is given, and what must go for it.
- `commands`: the one table of slash commands; dispatch, help and completion read it. `actions` is what they do.
- `partner`: the model talked to; `format` and `composer` turn turns into text and text into token ids.
- `settings`, `store`, `export`: what can be set; the folder of saved sessions; writing for other programs.
- `tools`: files, the editor, the clipboard.
- `reasoning`, `markdown`: an answer's text, taken apart as it comes.
- `source`, `terminal`: where lines come from: a pipe, or prompt_toolkit's line editing.

What a person sees goes through `exl_cli.console_chat`.
"""
