"""The Python API: responses, merging of settings, errors."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from fakehub import FakeHub
from fakes import ScriptedEngine
from shallow import shallow, shallow_gptq

import exl_cli
from exl_cli import Model, Sampling, download, load, loader
from exl_cli.errors import DownloadError, EngineError, ExlError, ModelNotFoundError, PromptError, UsageError
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import PRESETS

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load("fable-7m") as loaded:
        yield loaded


@pytest.fixture
def scripted() -> Callable[..., tuple[Model, ScriptedEngine]]:
    def make(answer: str, **info: Any) -> tuple[Model, ScriptedEngine]:
        found = dataclasses.replace(loader.resolve(None), **info)
        tokenizer = Tokenizer(found.path)
        engine = ScriptedEngine(tokenizer, answer, 1024)
        return Model(found, tokenizer, engine), engine

    return make


def test_importing_is_light_and_exports_every_name() -> None:
    heavy = "torch transformers exllamav2 huggingface_hub safetensors tokenizers jinja2 pynvml langchain_core"
    code = f"""
import sys, exl_cli
from exl_cli import Sampling, download, load
assert set(exl_cli.__all__) <= set(dir(exl_cli)) and all(getattr(exl_cli, name) for name in exl_cli.__all__)
print([name for name in {heavy.split()} if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="nonsense"):
        exl_cli.nonsense  # noqa: B018


def test_without_langchain_core_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['langchain_core'] = None; import exl_cli.langchain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: exl_cli.langchain needs langchain-core; run pip install 'exl-cli[langchain]'"
    )


@pytest.mark.smoke
def test_greedy_tokens_are_the_golden_ones(model: Model, golden_path: Path) -> None:
    with np.load(golden_path) as file:
        ids, expected = file["fable-7m-exl2.1.ids"].tolist(), file["fable-7m-exl2.1.greedy"].tolist()
    backend = tokenizers.Tokenizer.from_file(str(model.info.path / "tokenizer.json"))
    text = backend.decode(ids, skip_special_tokens=False)
    assert model.encode(text) == ids
    generation = model.generate(text, sampling=PRESETS["greedy"], max_new_tokens=24)
    assert list(generation.token_ids) == expected[:24]
    assert (generation.summary.prompt_tokens, generation.summary.new_tokens) == (len(ids), 24)
    assert generation.summary.finish_reason == "length"


def test_pieces_make_up_the_result(model: Model) -> None:
    with model.stream(STORY, max_new_tokens=20) as stream:
        pieces = list(stream)
        result = stream.result()
    assert "" not in pieces
    assert "".join(pieces) == result.text == str(result)
    assert len(result.token_ids) == result.summary.new_tokens == 20
    assert result.summary.generation_rate > 0 < result.summary.first_token_seconds
    assert list(stream) == []
    # Without a seed one is drawn and told.
    assert model.generate(STORY, seed=result.seed, max_new_tokens=20).text == result.text
    assert model.generate(STORY, max_new_tokens=20).seed != result.seed


def test_messages_go_through_the_chat_template(model: Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    # ChatML, as fable-7m's card says
    chatml = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert model.encode(messages) == Tokenizer(model.info.path).encode(chatml, add_special_tokens=False)
    answer = model.generate(messages, seed=1, max_new_tokens=5)
    assert answer.summary.prompt_tokens == len(model.encode(messages))
    assert answer.text == model.generate(chatml, seed=1, max_new_tokens=5).text


def test_special_tokens_in_messages_are_text(model: Model) -> None:
    end = 2  # <|im_end|>
    ids = model.encode([{"role": "user", "content": "hi<|im_end|>"}])
    assert ids.count(end) == model.encode([{"role": "user", "content": "hi"}]).count(end) == 1
    assert model.encode("hi<|im_end|>").count(end) == 1


@pytest.mark.parametrize(
    ("stop", "text"),
    [(["lily", "GIRL"], None), (["named", "girl"], "There was a ")],
)
def test_stop_strings_end_it_and_their_case_counts(scripted, stop: Any, text: str | None) -> None:
    answer = "There was a girl named Lily."
    generation = scripted(answer)[0].generate(STORY, stop=stop)
    assert generation.text == (answer if text is None else text)
    assert generation.summary.finish_reason == "stop"


def test_150_tokens_is_the_limit_unless_another_is_given(scripted) -> None:
    model, _ = scripted("word " * 400)
    assert model.generate(STORY).summary.new_tokens == 150
    assert model.generate(STORY, max_new_tokens=7).summary.new_tokens == 7


def theirs(**changes: Any) -> SimpleNamespace:
    """As exllamav2 0.3.2's ExLlamaV2Sampler.Settings: its own defaults, and fields of its own."""
    ours = {"token_repetition_penalty": 1.025, "temperature": 0.8, "top_k": 50, "top_p": 0.8, "mirostat": False}
    others = {"token_bias": None, "cfg_scale": None, "post_sampling_hooks": [], "ngram_trie": None}
    return SimpleNamespace(**{**ours, **others, **changes})


MODEL_SAYS = {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.2}
FROM_MODEL = Sampling(temperature=0.5, top_p=0.9, token_repetition_penalty=1.2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, FROM_MODEL),
        ({"temperature": 0.1}, dataclasses.replace(FROM_MODEL, temperature=0.1)),
        ({"sampling": {"min_p": 0.1}}, dataclasses.replace(FROM_MODEL, min_p=0.1)),
        ({"sampling": {"min_p": 0.1}, "min_p": 0.2}, dataclasses.replace(FROM_MODEL, min_p=0.2)),
        ({"sampling": Sampling()}, Sampling()),
        ({"sampling": Sampling(), "top_k": 5.0}, Sampling(top_k=5)),
        ({"sampling": theirs()}, Sampling(temperature=0.8, token_repetition_penalty=1.025)),
        ({"sampling": theirs(mirostat=True)}, Sampling(0.8, token_repetition_penalty=1.025, mirostat=True)),
    ],
)
def test_settings_win_by_how_near_they_are(scripted, given: dict[str, Any], expected: Sampling) -> None:
    model, engine = scripted("Yes.", generation_config=MODEL_SAYS)
    model.generate(STORY, **given)
    assert engine.requests[-1].sampling == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 1}, "temprature"),
        ({"sampling": {"temperature": "hot"}}, "temperature must be a number"),
        ({"top_k": 2.5}, "must be an integer"),
        ({"top_p": 2}, "top_p must be"),
        ({"sampling": object()}, "object has no sampler settings"),
        ({"sampling": theirs(cfg_scale=1.5)}, "cfg_scale"),
        ({"sampling": theirs(token_bias=[0.0])}, "token_bias"),
        ({"temperature": 10**400}, "temperature is out of range"),
        ({"top_k": True}, "top_k must be a number"),
        ({"sampling": {1: 2}}, "no sampler setting named '1'"),
        *(({"max_new_tokens": n}, "max_new_tokens must be an integer of at least 1") for n in (0, 1.0, True, None)),
        *(({"seed": n}, "seed must be an integer of at least 0") for n in (-1, True, "3")),
        *(({"stop": stop}, "stop must be a string or a list of strings") for stop in (5, None, [5], ["a", None], b"a")),
        *(
            ({"timeout": seconds}, "timeout must be a non-negative number")
            for seconds in (float("nan"), -1, "soon", True)
        ),
        ({"prompt": [{"role": "user", "content": {1, 2}}]}, "not set; pass each message's content as text"),
        *(
            ({"prompt": prompt}, "a prompt must be text or a list of messages")
            for prompt in ([1], b"abc", 7, None, [["user", "Hello"]], [{"content": "Hello"}], {"role": "user"})
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(scripted, given: dict[str, Any], message: str) -> None:
    model, engine = scripted("Yes.")
    with pytest.raises(UsageError, match=message):
        model.generate(**{"prompt": STORY, **given})
    assert engine.requests == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("word " * 1030, r"1,0\d\d tokens, but the context holds 1,024"),
        ("a\ud800", r"lone surrogate, U\+D800"),
        ([{"role": "user", "content": "\udfff"}], r"lone surrogate, U\+DFFF"),
        ([], "no message"),
    ],
)
def test_prompts_that_cannot_be_sent_are_refused(scripted, prompt: Any, message: str) -> None:
    model, engine = scripted("Yes.")
    with pytest.raises(PromptError, match=message):
        model.generate(prompt)
    assert engine.requests == []


@pytest.mark.parametrize("timeout", [float("inf"), 1e20, 10**400])
def test_a_timeout_of_centuries_is_none(scripted, timeout: float) -> None:
    assert scripted("Yes.")[0].generate(STORY, timeout=timeout).text == "Yes."


def test_loading_errors_explain_the_problem(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="owner/name"):
        load("owner/name", models_dir=tmp_path)
    with pytest.raises(UsageError, match="q3"):
        load("fable-7m", cache="q3")


@pytest.mark.parametrize("length", ["100", 1.5, True, -1])
def test_a_context_of_a_wrong_kind_is_refused(length: Any) -> None:
    with pytest.raises(UsageError, match="max_seq_len must be at least 1 token"):
        load("fable-7m", max_seq_len=length)


@pytest.mark.parametrize("split", [5, "20,24", ["a"], [float("nan")], [-1.0], [], [0.0]])
def test_a_gpu_split_of_a_wrong_kind_is_refused(split: Any) -> None:
    with pytest.raises(UsageError, match="is not a list of GiB per GPU"):
        load("fable-7m", gpu_split=split)


def test_the_context_is_what_was_asked_for() -> None:
    with load(shallow_gptq(), max_seq_len=40, engine="cpu") as model:
        assert model.context_length == 40
        assert model.facts["engine"] == "cpu"
        assert model.memory() == []
        assert model.generate(STORY, seed=1).summary.new_tokens == 40 - len(model.encode(STORY))


def test_closing_gives_the_engine_back_once(scripted) -> None:
    model, engine = scripted("Yes.")
    with model:
        assert model.generate(STORY).text == "Yes."
    assert engine.closed
    assert model.closed
    model.close()
    with pytest.raises(EngineError, match="closed"):
        model.generate(STORY)
    assert model.memory() == []


def test_download_follows_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {path.name: path.read_bytes() for path in shallow().iterdir() if path.is_file()}
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        hub.repository("owner/fable-GPTQ", files)
        assert download("owner/fable-GPTQ") == "./models/owner_fable-GPTQ"
        out, err = capsys.readouterr()
        assert out == ""
        first, *_ = err.splitlines()
        place = "models/owner_fable-GPTQ"
        assert re.fullmatch(rf"Downloading owner/fable-GPTQ \(commit \w{{8}}\) to {place}: \d+ files, .* MB", first)
        fetched = len(hub.requests())
        assert download("owner/fable-GPTQ") == "./models/owner_fable-GPTQ"
        assert capsys.readouterr().out == "owner/fable-GPTQ already exists in the models directory\n"
        assert len(hub.requests()) == fetched > 0
        with pytest.raises(DownloadError):
            download("owner/another", models_dir=tmp_path)
    with load("./models/owner_fable-GPTQ") as model:
        assert model.generate(STORY, seed=1, max_new_tokens=3).summary.new_tokens == 3
    with pytest.raises(UsageError, match="not a name"):
        download("not a name")


def test_too_little_time_is_an_error_of_exl_and_of_python(model: Model) -> None:
    with pytest.raises(
        ExlError, match=r"the response was not complete after 0\.01 seconds; raise the timeout"
    ) as caught:
        model.generate(STORY, max_new_tokens=900, timeout=0.01)
    assert isinstance(caught.value, TimeoutError)
