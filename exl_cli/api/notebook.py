"""What the LangChain notebook prints, on the stream where it prints it: stdout, between the model's own words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exl_cli.ui.console import Console

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from exl_cli.engines.base import Summary
    from exl_cli.sampling import Sampling


class NotebookConsole(Console):
    """A console whose notes are on stdout."""

    @property
    def err(self) -> RichConsole:
        """Rich's console on stdout."""
        return self.out

    def already_there(self, model_name: str) -> None:
        """`download` found the model in its place."""
        self.note(f"{model_name} already exists in the models directory")

    def loading_model(self, sampling: Sampling, model_path: str) -> None:
        """The two lines before a model is loaded."""
        self.note(str(sampling.brief()))
        self.note(f"Loading model: {model_path}")

    def loaded(self, stop_sequences: list[str]) -> None:
        """The line after that."""
        self.note(f"stop_sequences {stop_sequences}")

    def generated(self, summary: Summary) -> None:
        """The two lines after a response, and the empty one that sets them off from its text."""
        self.note("\n")
        self.summary(summary)
