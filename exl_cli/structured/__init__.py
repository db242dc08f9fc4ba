"""The structure of an answer: reasoning, text and tool calls told apart."""
