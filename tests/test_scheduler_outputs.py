"""Log-probabilities, bans and bias in the scheduler, on a model that detects paging errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakeforward import FakeForward, _logits
from scheduling import Batch, Model, ask

from exl_cli.engines.base import Request
from exl_cli.engines.exllamav2.prompt_lookup import PromptLookup
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.engines.response import Step
from exl_cli.engines.sampling.sampler import Samplers
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build


class Real:
    """A scheduler with the real samplers of a real vocabulary."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.tokenizer = Tokenizer(folder)
        self.forward = FakeForward(pages=60, vocab_size=self.tokenizer.vocab_size, spread=3.0, memory=3)
        samplers = Samplers(self.tokenizer, self.forward.vocab_size)
        self.scheduler = Scheduler(
            self.forward, samplers.make, outputs=samplers.outputs, score=samplers.prompt_logprobs, **options
        )
        self.batch = Batch(self.scheduler)

    def run(self, request: Request) -> list[Step]:
        steps = [*self.batch.steps(request, request.max_new_tokens)]
        assert self.scheduler.num_allocated_pages == 0
        return steps

    def logits(self, ids: list[int]) -> torch.Tensor:
        return torch.stack([_logits(state, self.forward.vocab_size, 3.0) for state in self.forward.states(ids)])


@pytest.fixture(scope="module", params=[None, "ngram"])
def real(request, exl2_dir: Path) -> Real:
    return Real(exl2_dir, drafter=PromptLookup() if request.param else None)


def tokens_of(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


def test_logprobs_are_log_softmax_of_the_logits(real: Real) -> None:
    request = ask(range(300, 321), 40, logprobs=2, prompt_logprobs=1)
    real.run(ask(request.ids, 5))  # what is in the cache is computed again
    steps = real.run(request)
    tokens = tokens_of(steps)
    assert len(tokens) == 40
    ids = [*request.ids, *tokens]
    expected = torch.log_softmax(real.logits(ids).double(), -1).numpy()
    prompt = next(step for step in steps if step.prompt_seconds is not None)
    assert prompt.reused_tokens == 0
    new = [it for step in steps for it in step.logprobs]
    assert all(len(step.logprobs) == len(step.token_ids) for step in steps)
    scored = [*prompt.prompt_logprobs, *new]
    assert [it.token_id for it in scored] == ids[1:]
    assert [it.logprob for it in scored] == pytest.approx(
        [row[id_] for row, id_ in zip(expected, ids[1:], strict=False)], abs=1e-4
    )
    for count, some, rows in ((1, prompt.prompt_logprobs, expected[:20]), (2, new, expected[20:])):
        best = [np.sort(row)[::-1][:count] for row in rows[: len(some)]]
        assert [[value for _, value in it.top] for it in some] == [pytest.approx(row, abs=1e-4) for row in best]


def test_banned_strings_are_never_generated_and_other_text_keeps_its_probability(real: Real) -> None:
    request = ask(range(300, 330), 60)
    plain = tokens_of(real.run(request))
    text = real.tokenizer.decode(plain)
    banned = (text[9:12], text[20:21].upper(), text[40:46])
    others = [real.batch.steps(ask(range(400 + n, 420 + n), 30), 30) for n in range(2)]
    for other in others:
        next(other)
    steps = [*real.batch.steps(ask(request.ids, 60, banned_strings=banned, logprobs=0), 60)]
    tokens = tokens_of(steps)
    got = real.tokenizer.decode(tokens).casefold()
    assert len(tokens) == 60
    assert not [text for text in banned if text.casefold() in got]
    # What was chosen follows from the tokens before it, and from nothing that was taken back.
    expected = torch.log_softmax(real.logits([*request.ids, *tokens]), -1)[29:-1]
    got_logprobs = [it.logprob for step in steps for it in step.logprobs]
    assert got_logprobs == pytest.approx([row[id_].item() for row, id_ in zip(expected, tokens, strict=True)], abs=1e-4)
    # Greedy: a token that is not the likeliest stands where the likeliest would begin a banned string.
    first = next(i for i, (a, b) in enumerate(zip(plain, tokens, strict=True)) if a != b)
    ahead = real.tokenizer.decode(plain[: first + 8]).casefold()
    assert any(text.casefold() in ahead for text in banned)
    for other in others:
        tokens_of([*other])
    assert real.scheduler.num_allocated_pages == 0


def test_no_new_tokens_means_the_prompt_alone() -> None:
    model = Model()
    request = ask(range(11), 0, prompt_logprobs=0)
    (step,) = model.steps(request)
    assert step.prompt_seconds is not None
    assert not step.token_ids
    assert model.scheduler.num_allocated_pages == 0
    assert next(model.steps(ask([5], 0))).prompt_seconds is not None


def test_salts_share_no_pages() -> None:
    model = Model()
    assert model.run(ask(range(12), 3, cache_salt="a"))[1] == 0
    assert model.run(ask(range(12), 3, cache_salt="b"))[1] == 0
    assert model.run(ask(range(12), 3))[1] == 0
    assert model.run(ask(range(12), 3, cache_salt="b"))[1] == 11


def test_where_every_token_is_ruled_out_the_request_ends_with_a_line(real: Real) -> None:
    everything = {id_: float("-inf") for id_ in range(real.forward.vocab_size)}
    with pytest.raises(Exception, match="every token is banned"):
        real.run(ask(range(300, 309), 3, build({}, "creative"), logit_bias=everything))
    assert len(tokens_of(real.run(ask(range(300, 309), 3)))) == 3
