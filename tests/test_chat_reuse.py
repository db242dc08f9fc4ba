"""The CPU engine's prefix reuse, and a real conversation with the built-in model."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import tinymodels
import torch
from chatting import turns
from helpers import Recorder, collect
from typer.testing import CliRunner

from exl_cli import loader
from exl_cli.api.engine_thread import ChunkStream, EngineThread
from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.engines.base import Engine, Request
from exl_cli.engines.cpu.kv_cache import KvCache
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import Sampling, build

GREEDY = build({}, "greedy")


def load(path: Path) -> EngineThread:
    info = loader.resolve(str(path))
    return EngineThread(loader.load(info, Tokenizer(info.path), LoadOptions(engine="cpu"), Recorder()))


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 4000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_greedy(engine: EngineThread, ids: Sequence[int], new: int, reused: int | range) -> list[int]:
    """Generate greedily; each token must be the likeliest by the model without any cache, up to a near tie."""
    _, tokens, summary = collect(engine.stream(Request(ids, GREEDY, new, 0)))
    assert summary.reused_tokens in ([reused] if isinstance(reused, int) else reused)
    logits = engine.logits([*ids, *tokens[:-1]])[len(ids) - 1 :]  # type: ignore[attr-defined]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((logits.max(1).values - chosen).max()) < 1e-3
    return tokens


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tinymodels.write(folder, tinymodels.VARIANTS["float16"])
    engine = load(folder)
    yield engine
    engine.close()


def test_a_conversation_is_computed_once(engine: EngineThread) -> None:
    first = prompt(200, seed=1)
    tokens = check_greedy(engine, first, 20, 0)
    # The last token of an answer has been chosen, not computed.
    second = [*first, *tokens, *prompt(30, seed=2)]
    check_greedy(engine, second, 20, 219)
    check_greedy(engine, second, 20, len(second) - 1)
    check_greedy(engine, [*first, *prompt(50, seed=3)], 20, 200)
    check_greedy(engine, prompt(50, seed=4), 20, 0)
    check_greedy(engine, prompt(50, seed=4)[:1], 5, 0)


def test_the_same_seed_gives_the_same_text_with_and_without_reuse(engine: EngineThread) -> None:
    ids = prompt(300, seed=5)
    cold, warm = (collect(engine.stream(Request(ids, Sampling(), 30, seed=9))) for _ in range(2))
    assert (cold[2].reused_tokens, warm[2].reused_tokens) == (0, 299)
    assert cold[1] == warm[1]


@contextmanager
def at_layer(number: int, action: Callable[[], object]) -> Iterator[None]:
    """Within it, `action` is called in the engine's thread right before the decoder layer of that number."""
    layers = count(1)

    def before(module: torch.nn.Module, args: object) -> None:
        if type(module).__name__.endswith("DecoderLayer") and next(layers) == number:
            action()

    hook = torch.nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("layer", range(1, 9))
def test_a_pass_that_is_cancelled_between_two_layers_leaves_the_cache_right(engine: EngineThread, layer: int) -> None:
    ids = prompt(300, seed=100 + layer)
    asked: Future[ChunkStream] = Future()
    with at_layer(layer, lambda: asked.result(30).cancel()):
        asked.set_result(engine.stream(Request(ids, GREEDY, 5, 0)))
        _, tokens, summary = collect(asked.result())
    assert (tokens, summary.finish_reason) == ([], "cancelled")
    # Whole chunks of the prompt are kept, and no part of one.
    check_greedy(engine, ids, 5, range(0, 300))


def test_a_pass_that_fails_leaves_the_cache_right(engine: EngineThread) -> None:
    ids = prompt(300, seed=6)
    check_greedy(engine, ids[:150], 5, 0)

    def fail() -> None:
        raise MemoryError

    with at_layer(5, fail), pytest.raises(MemoryError):
        collect(engine.stream(Request(ids, GREEDY, 5, 0)))
    check_greedy(engine, ids, 10, range(150, 300))


def caches() -> int:
    gc.collect()
    return sum(type(thing) is KvCache for thing in gc.get_objects())


def test_a_sliding_window_is_continued_but_cut_only_while_it_is_whole(tmp_path: Path) -> None:
    config = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}
    tinymodels.write(tmp_path / "model", tinymodels.Variant("float", config=config))
    engine = load(tmp_path / "model")
    short = prompt(8, seed=1)
    check_greedy(engine, short, 4, 0)
    check_greedy(engine, [*short[:6], *prompt(3, seed=2)], 2, 6)
    long = prompt(40, seed=3)
    tokens = check_greedy(engine, long, 10, 0)
    check_greedy(engine, [*long, *tokens, *prompt(5, seed=4)], 5, 49)
    check_greedy(engine, long, 5, 0)
    before = caches()
    engine.close()
    assert caches() == before - 1


def test_rotary_embeddings_that_change_with_the_length_are_not_mixed(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 40,
        "short_factor": [1.0] * 32,
        "long_factor": [3.0] * 32,
        "attention_factor": 1.0,
    }
    config = {"rope_theta": None, "rope_parameters": rope}
    tinymodels.write(tmp_path / "model", tinymodels.Variant("float", config=config))
    engine = load(tmp_path / "model")
    short, long = prompt(20, seed=1), [*prompt(20, seed=1), *prompt(40, seed=2)]
    check_greedy(engine, short, 5, 0)
    check_greedy(engine, long[:30], 5, 20)
    check_greedy(engine, long, 5, 0)
    check_greedy(engine, short, 5, 0)


def test_a_real_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXL_DATA_DIR", str(tmp_path))
    args = ["chat", "--engine", "cpu", "-n", "15", "--seed", "1"]
    result = CliRunner().invoke(app, args, input="Tell me a story about a fox.\nAnd then?\n/retry\n", obj=State())
    assert result.exit_code == 0
    rows = re.findall(r"^prompt (\d+) tokens \((\d+) reused\) · (\d+) new", result.stderr, re.M)
    (first, zero, new), (second, reused, _), (again, all_but_one, _) = [tuple(map(int, row)) for row in rows]
    assert (zero, reused, again, all_but_one) == (0, first + new - 1, second, second - 1)
    said = turns(tmp_path)
    assert [role for role, _ in said] == ["user", "assistant"] * 2
    assert result.stdout.startswith(said[1][1].lstrip() + "\n")
    assert result.stdout.endswith(said[3][1].lstrip() + "\n")
