"""Published API clients, unmodified, against a server on loopback. Each skips if it is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from serving import HeldLoader, serving
from wireformats import application

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "Tell me a story."}]


@contextmanager
def served(**models: str | None) -> Iterator[str]:
    """The address of a server of these models."""
    with application(**models) as app:
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started and thread.is_alive():
            thread.join(0.05)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as address:
        yield address


@pytest.fixture(scope="module")
def openai(url: str) -> Iterator[Any]:
    with pytest.importorskip("openai").OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic(url: str) -> Iterator[Any]:
    with pytest.importorskip("anthropic").Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat(openai: Any) -> None:
    asked = {"model": "fable-7m", "messages": MESSAGES, "max_completion_tokens": 12, "seed": 1}
    whole = openai.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    choice = whole.choices[0]
    assert choice.finish_reason == "length"
    assert whole.usage.completion_tokens == len(choice.logprobs.content) == 12
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
    chunks = list(openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert chunks[-1].usage.completion_tokens == 12
    stopping = {**asked, "stop": [" a", " the", "."], "max_completion_tokens": 200}
    with openai.chat.completions.stream(**stopping) as stream:  # checks and collects the events itself
        stream.until_done()
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "stop"
    assert final.message.content == openai.chat.completions.create(**stopping).choices[0].message.content


def test_openai_models(openai: Any) -> None:
    (model,) = openai.models.list()
    assert (model.id, model.object) == ("fable-7m", "model")
    assert openai.models.retrieve("fable-7m").owned_by == "exl"


def test_openai_usage_so_far(openai: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"model": "fable-7m", "messages": MESSAGES, "max_completion_tokens": 6, "seed": 1}
    chunks = list(openai.chat.completions.create(**asked, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert set(range(1, 7)) <= set(counts)


def test_openai_completions(openai: Any) -> None:
    asked = {"model": "fable-7m", "prompt": ["Once upon", "There was"], "max_tokens": 8, "seed": 1, "n": 2}
    whole = openai.completions.create(**asked, logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert all("".join(choice.logprobs.tokens) == choice.text for choice in whole.choices)
    texts = ["", "", "", ""]
    for chunk in openai.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_openai_responses(openai: Any) -> None:
    asked = {"model": "fable-7m", "input": "Tell me a story.", "max_output_tokens": 12, "extra_body": {"seed": 1}}
    whole = openai.responses.create(**asked)
    assert whole.status == "incomplete"
    assert whole.usage.output_tokens == 12
    with openai.responses.stream(**asked) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text != ""


def test_openai_errors(openai: Any) -> None:
    import openai as package

    with pytest.raises(package.BadRequestError) as error:
        openai.chat.completions.create(model="fable-7m", messages=[{"role": "user", "content": "word " * 3000}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(package.NotFoundError):
        openai.chat.completions.create(model="gpt-4", messages=MESSAGES)


def test_anthropic_messages(anthropic: Any) -> None:
    # Its newest version knows of no temperature.
    asked = {"model": "fable-7m", "messages": MESSAGES, "max_tokens": 12, "extra_body": {"temperature": 0}}
    whole = anthropic.messages.create(**asked, system="Be brief.")
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 12
    with anthropic.messages.stream(**asked, system="Be brief.") as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == "max_tokens"
    count = anthropic.messages.count_tokens(model="fable-7m", messages=MESSAGES, system="Be brief.").input_tokens
    assert whole.usage.input_tokens + whole.usage.cache_read_input_tokens == count
    stopped = anthropic.messages.create(**{**asked, "max_tokens": 200}, stop_sequences=["a"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "a")


def test_langchain_openai(url: str) -> None:
    package = pytest.importorskip("langchain_openai")
    chat = package.ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model="fable-7m", max_tokens=12, seed=1, stream_usage=True
    )
    whole = chat.invoke("Tell me a story.")
    assert whole.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.text for chunk in chat.stream("Tell me a story.")) == whole.text
    responses = package.ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model="fable-7m", max_tokens=12, use_responses_api=True, temperature=0
    )
    whole = responses.invoke("Tell me a story.")
    assert whole.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.text for chunk in responses.stream("Tell me a story.")) == whole.text


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_litellm(url: str, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    asked = {
        "model": f"{provider}/fable-7m", "api_base": f"{url}/v1" if provider == "openai" else url, "api_key": "none",
        "messages": MESSAGES, "max_tokens": 12, "extra_body": {"seed": 1},
    }  # fmt: skip
    whole = litellm.completion(**asked)
    assert whole.usage.completion_tokens == 12
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True))
    # It has no way to fix the seed of an Anthropic model.
    assert streamed.strip()
    assert provider == "anthropic" or streamed == whole.choices[0].message.content


def test_llm(url: str, tmp_path: Path) -> None:
    if not importlib.util.find_spec("llm"):
        pytest.skip("llm is not installed")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: fable\n  model_name: fable-7m\n  api_base: {url}/v1\n", encoding="utf-8"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}

    def run(*flags: str) -> str:
        options = ["-o", "max_tokens", "12", "-o", "temperature", "0"]
        command = [sys.executable, "-m", "llm", "-m", "fable", *flags, *options]
        return subprocess.run([*command, "Hi"], env=environment, check=True, capture_output=True, text=True).stdout

    assert run() == run("--no-stream") != ""


# Sentences of two endings each, the first of which is right: as tasks of lm-evaluation-harness have them.
SENTENCES = [
    ("Once upon a", " time", " fox"),
    ("The little girl was very", " happy", " table"),
    ("They went to the park to", " play", " sky"),
    ("Tom was sad because he lost his", " toy", " moon"),
    ("The sun was", " shining", " barking"),
    ("The dog started to", " bark", " book"),
]


TALE = """Once upon a time there was a small fox who lived in a quiet wood. Every day she went to the river to drink.
One day the river was dry, and the fox was sad. She asked the old owl what to do, and the owl told her to wait."""


def test_lm_eval_scores_as_transformers_do(tmp_path: Path) -> None:
    """Accuracy, log-likelihoods and the perplexity of a text: of a float model here, and of transformers in lm-eval."""
    lm_eval = pytest.importorskip("lm_eval")
    import tinymodels
    from lm_eval.tasks import TaskManager

    model = os.environ.get("EXL_TEST_FLOAT_MODEL", "")
    if not model:
        model = str(tmp_path / "model")
        tinymodels.write(Path(model), tinymodels.Variant("float"))
    data = {
        "endings": [{"query": query, "choices": choices, "gold": 0} for query, *choices in SENTENCES],
        "tale": [{"text": TALE}],
    }
    tasks = {
        "endings": "output_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n",
        "tale": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
        "metric_list: [{metric: word_perplexity}]\n",
    }
    for name, lines in data.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path / name}.jsonl}}, cache_dir: {tmp_path / 'cache'}}}\n"
            + tasks[name],
            encoding="utf-8",
        )

    def scores(kind: str, arguments: str) -> tuple[float, float, list[float]]:
        evaluated = lm_eval.simple_evaluate(
            kind, arguments, [*data], device="cpu", bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )  # fmt: skip
        results, samples = evaluated["results"], sorted(evaluated["samples"]["endings"], key=lambda s: s["doc_id"])
        values = [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
        return results["endings"]["acc,none"], results["tale"]["word_perplexity,none"], values

    with served(float=model) as url:
        api = f"model=float,base_url={url}/v1/completions,tokenizer={model},tokenizer_backend=huggingface"
        here = scores("local-completions", api)
    there = scores("hf", f"pretrained={model},dtype=float32")
    assert here[0] == there[0]
    assert here[1] == pytest.approx(there[1], rel=1e-3)
    assert here[2] == pytest.approx(there[2], abs=2e-3)


@pytest.mark.timeout(300)  # large schemas take it a while
def test_schemathesis_meets_no_failure_of_the_server() -> None:
    """Bodies and paths made from the OpenAPI document, over a model that answers in four words."""
    schemathesis = pytest.importorskip("schemathesis")
    statuses: Counter[int] = Counter()
    with serving({"fable-7m": None}, HeldLoader()) as server:
        for operation in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():

            @settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(operation.ok().as_strategy())
            def check(case: Any) -> None:
                status = case.call(timeout=60).status_code
                statuses[status] += 1
                assert status < 500

            check()
    assert statuses[200] > 5
    assert statuses[400] > 5
