"""Measures what Ray costs: jobs of short prompts on an engine that computes nothing, with Ray and without, in turns.

python tests/batch_ray_overhead.py [PROMPTS [TURNS]]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from fakes import ScriptedEngine

from exl_cli import loader
from exl_cli.batch import manifest, output, passes
from exl_cli.batch.cluster import RayEngines, Where
from exl_cli.batch.job import Progress
from exl_cli.batch.models import ModelNames
from exl_cli.batch.prompts import Settings
from exl_cli.batch.rows import open_source
from exl_cli.batch.windows import Options
from exl_cli.engines.base import Engine
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer


def load_scripted(info: ModelInfo, tokenizer: Tokenizer, *args: object) -> Engine:
    """An engine whose answers are ready."""
    return ScriptedEngine(tokenizer, " yes", info.context_length)


class _View:
    def note(self, message: str) -> None:
        print(message)

    def update(self, progress: Progress) -> None:
        pass

    def progress(self, done: int, total: int) -> None:
        pass


def main(count: int = 10_000, turns: int = 3) -> None:
    """Print the figures."""
    info, settings, loading, view = loader.resolve(None), Settings(), LoadOptions(engine="cpu"), _View()
    one = passes.OneEngine(
        lambda model, tokenizer: passes.load_engine(model, tokenizer, loading, None, load_scripted, view),
        settings,
        loading,
    )
    actors = RayEngines(Where(None, 1), settings, loading, None, load_scripted)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, prompts: Path, engines: passes.Engines) -> float:
            sink = output.AnswerFile(prompts.with_name(name), manifest.manifest(info, settings))
            start = time.monotonic()
            names = ModelNames(info, None, None)
            passes.answer_input(prompts, open_source(prompts), sink, names, engines, view, Options())
            sink.close()
            return time.monotonic() - start

        few, many = Path(folder, "few.jsonl"), Path(folder, "many.jsonl")
        few.write_text('{"prompt": "0"}\n')
        many.write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(count)))
        for name, engines in (("without", one), ("with", actors)):
            run(f"{name}.first", few, engines)  # which starts them
        for turn in range(turns):
            for name, engines in (("without", one), ("with", actors)):
                seconds[name].append(run(f"{name}.{turn}", many, engines))
                print(f"{name} Ray: {seconds[name][-1]:.1f} s for {count:,} prompts", flush=True)
    actors.close()
    without, with_ray = (median(some) for some in seconds.values())
    more = (with_ray - without) / count * 1e3
    print(f"with Ray over without: {with_ray / without:.2f} of the time, {more:+.3f} ms a prompt")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
