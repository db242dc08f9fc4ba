"""What a worker is asked to do, in a form that a process can be handed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from exl_cli.bench.plan import Settings
from exl_cli.models.load_options import LoadOptions
from exl_cli.sampling import Sampling


@dataclass(frozen=True)
class Job:
    """What a worker has to do.

    Attributes:
        model, models_dir: see `loader.resolve`.
        loading: how to load it.
        settings, sampling: of all models alike.
        perplexity: a text to evaluate, or None.
        spawned: when the worker's process was started, on the system's monotonic clock; None where it runs in a
            process that did other things before, whose first generation says nothing.
    """

    model: str | None
    models_dir: str | None
    loading: LoadOptions
    settings: Settings
    sampling: Sampling
    perplexity: str | None = None
    spawned: float | None = None

    def to_json(self) -> str:
        """For stdin."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """From stdin."""
        value = json.loads(text)
        loading, settings = value.pop("loading"), value.pop("settings")
        split = loading["gpu_split"]
        return cls(
            **{key: value[key] for key in ("model", "models_dir", "perplexity", "spawned")},
            loading=LoadOptions(**{**loading, "gpu_split": None if split is None else tuple(split)}),
            settings=Settings.read(settings),
            sampling=Sampling(**value["sampling"]),
        )
