"""Decides which model answers a row: the one it names if that is installed, otherwise the job's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from exl_cli import loader
from exl_cli.batch.rows import Row
from exl_cli.errors import ExlError, ModelNotFoundError
from exl_cli.models.hub import names
from exl_cli.models.info import ModelInfo

# Most names to remember, as every line may have a different one.
_MOST_NAMES = 10_000


class ModelNames:
    """The models that the rows of an input name.

    Args:
        default: answers rows that name no model, or one that is not installed.
        given: the name the user gave for it.
        folder: folder of downloaded models; see `loader.resolve`.

    Attributes:
        models: the default, then the other models named so far.
        missing: number of rows by name of a model that is not installed.
    """

    def __init__(self, default: ModelInfo, given: str | None, folder: Path | None) -> None:
        self.models = [default]
        self.missing: Counter[str] = Counter()
        self._folder = folder
        self._known: dict[str, ModelInfo | ExlError | None] = {name: default for name in (given, default.name) if name}

    def of(self, row: Row) -> ModelInfo:
        """The model that answers a row.

        Raises:
            ExlError: the model it names is installed but cannot be run.
        """
        name = named_model(row)
        if name is None:
            return self.models[0]
        if name not in self._known and len(self._known) < _MOST_NAMES:
            self._known[name] = self._look_up(name)
        model = self._known.get(name)
        if isinstance(model, ExlError):
            raise model
        if model is None:
            if name in self.missing or len(self.missing) < _MOST_NAMES:
                self.missing[name] += 1
            return self.models[0]
        return model

    def _look_up(self, name: str) -> ModelInfo | ExlError | None:
        # A name in a line must not reach folders other than installed models', as in a request to a server.
        if name in ("", ".", "..") or ("/" in name and names.parse(name) is None):
            return None
        try:
            info = loader.resolve_name(name, self._folder)
        except ModelNotFoundError:
            return None
        except ExlError as error:
            return error
        for model in self.models:
            if model.path.resolve() == info.path.resolve():
                return model
        self.models.append(info)
        return info


def named_model(row: Row) -> str | None:
    """The name of a model in a row, if any. Columns of a table are not settings."""
    if row.is_table:
        return None
    body: Any = row.record.get("body")
    name = (body if isinstance(body, dict) else row.record).get("model")
    return name if isinstance(name, str) else None
