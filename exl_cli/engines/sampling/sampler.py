"""The reference sampler, on the CPU in NumPy: one position's logits to the next token.

It has the same steps in the same order as exllamav2 0.3.2's sampler, and the same distributions, except for rounding
and the defects below. The token is drawn by an exponential race (the Gumbel-max trick): each candidate of probability p
gets exponential noise E, a function of seed, position and token (see `noise`), and the smallest E / p wins. Small
changes of the distribution, as from another order of summation, then rarely change the token.

Differences from exllamav2, all towards the published algorithms:

- Top-p: exllamav2 drops the token that reaches the threshold and fills up with less likely ones. Of (0.5, 0.35, 0.1,
  0.05) at 0.8 it keeps the first, third and fourth. Here: the fewest most likely tokens with a sum of at least p
  (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).
- Min-p and top-a: exllamav2 keeps one token too many if it keeps the last candidate, and reads past the end if it keeps
  all. Its min-p of 1 is off; here it keeps the most likely token. Its top-a above 1 can drop every token; here never.
- Typical: exllamav2 uses p + log p as the log-probability, and drops the token that reaches the threshold. Here:
  Meister et al. 2023, https://arxiv.org/abs/2202.00666.
- Tail-free: if only two tokens have a significant probability, exllamav2 keeps one; here both.
- Last and dynamic temperature: near 0, exllamav2's powers underflow to 0 / 0; here they are relative to the most likely
  token. A temperature below 0.01 is greedy with `temperature_last` too.
- XTC: exllamav2 tests the probability of the next candidate instead of the current one, which is wrong for unsorted
  candidates. Here: text-generation-webui pull request 6335, with two refinements of exllamav2's: instead of flipping a
  coin, mix the distributions of both outcomes; and protected tokens are ignored instead of disabling XTC.
- Skew: exllamav2 leaves tokens below 1e-8 behind the sorted ones; here they are dropped.
- Mirostat: mu starts at 2 tau, once; exllamav2 resets it whenever it happens to be 0.
- DRY: see `dry`.
- NaN and infinite logits are errors; exllamav2 returns some token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from exl_cli.engines.base import Request, TokenLogprobs
from exl_cli.engines.output_tokens import OutputTokens
from exl_cli.engines.sampling.dry import BoolArray, FloatArray, IntArray, apply_dry, dry_breakers, token_mask
from exl_cli.engines.sampling.filters import (
    Candidates,
    add_bias,
    all_ruled_out,
    best,
    descending,
    draw,
    dynamic_temperature,
    lowered,
    min_p,
    penalize,
    retemper,
    shortlist,
    softmax,
    surprise_limit,
    tail_free,
    top_a,
    top_k,
    top_p,
    typical,
    xtc,
)
from exl_cli.engines.sampling.logprobs import token_logprobs
from exl_cli.engines.sampling.noise import exponential, uniform
from exl_cli.errors import EngineError, UsageError, param
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import Sampling

AnyFloats = npt.NDArray[np.floating[Any]]

# With at least this many logits and at most this `top_k`, a shortlist of the highest logits is faster.
_LARGE = 2048
_MOST_SHORT = 512


def xtc_protected(pieces: Sequence[str], special: Collection[int]) -> frozenset[int]:
    """Ids that XTC never drops, by exllamav2's rule: special tokens and tokens with a newline.

    Args:
        pieces: decoded text of each token, by id.
        special: ids of the special tokens.
    """
    return frozenset(special).union(i for i, piece in enumerate(pieces) if "\n" in piece)


class Sampler:
    """The sampler of one generation. It has state (history, mirostat), so make one for each.

    Args:
        settings: sampler settings.
        seed: seed of the noise.
        vocab_size: size of the tokenizer's vocabulary; logits beyond it are padding and ignored.
        breakers: returns the ids of DRY's sequence breakers; called only if DRY is on.
        protected: returns the ids that XTC never drops; called only if XTC is on.
        bias: added to logits; see `Request.logit_bias`.
        min_length: `end_ids` are banned while the history is shorter than this.
        end_ids: ids that end the generation.

    Attributes:
        settings, seed, vocab_size: as given.
        breakers, protected: masks [vocab_size].
        reads_history: whether logits depend on the tokens so far.
        bits: mirostat's current limit on a token's surprise.
    """

    def __init__(
        self,
        settings: Sampling,
        seed: int,
        *,
        vocab_size: int,
        breakers: Callable[[], Collection[int]] = frozenset,
        protected: Callable[[], Collection[int]] = frozenset,
        bias: Mapping[int, float] | None = None,
        min_length: int = 0,
        end_ids: Collection[int] = (),
    ) -> None:
        self.settings, self.seed, self.vocab_size = settings, seed, vocab_size
        self._all_ids = np.arange(vocab_size)
        self.bits = 2.0 * settings.mirostat_tau
        self._penalties = (
            settings.token_repetition_penalty != 1.0
            or settings.token_frequency_penalty != 0.0
            or settings.token_presence_penalty != 0.0
        )
        self._dry = settings.dry_multiplier > 0.0
        self.reads_history = self._penalties or self._dry
        self._bias_of = {id_: value for id_, value in (bias or {}).items() if id_ < vocab_size}
        self._min_length, self._end_ids = min_length if end_ids else 0, end_ids
        self._history = History(vocab_size)
        self._short = self._can_shortlist()
        self.breakers = token_mask(breakers() if self._dry else (), vocab_size)
        self.protected = token_mask(protected() if settings.xtc_probability > 0.0 else (), vocab_size)
        self._steps = self._filters()

    def sample(self, logits: AnyFloats, history: Sequence[int], banned: Collection[int] = ()) -> int:
        """Sample the next token. Deterministic in its arguments, except for mirostat's state.

        Args:
            logits: [n], any float type; not modified.
            history: all tokens so far, including the prompt. From call to call it must grow at the end, or be shorter.
            banned: ids banned at this position.

        Raises:
            EngineError: a logit is NaN or infinite.
            UsageError: every token is banned.
            ValueError: logits are not one-dimensional, or empty.
        """
        ids, probs = self.distribution(logits, history, banned)
        chosen = 0
        if len(ids) > 1 and self.settings.skew:
            # A power of the uniform number moves it towards one end of the sorted candidates.
            point = uniform(self.seed, len(history)) ** math.exp(-self.settings.skew)
            chosen = draw(probs, point)
        elif len(ids) > 1:
            chosen = int((probs / exponential(self.seed, len(history), ids)).argmax())
        self.observe(probs[chosen])
        return int(ids[chosen])

    def observe(self, prob: float) -> None:
        """Update mirostat with the probability of the sampled token."""
        if self.settings.mirostat:
            self.bits += self.settings.mirostat_eta * (self.settings.mirostat_tau + math.log2(prob))

    def edits(self, length: int, banned: Collection[int]) -> dict[int, float]:
        """Biases by token id for a history of `length` tokens; -inf bans a token."""
        if length < self._min_length:
            banned = {*banned, *self._end_ids}
        if not banned:
            return self._bias_of
        ruled_out = {id_: -math.inf for id_ in banned if id_ < self.vocab_size}
        return {**self._bias_of, **ruled_out}

    def distribution(self, logits: AnyFloats, history: Sequence[int], banned: Collection[int] = ()) -> Candidates:
        """The distribution that `sample` draws from; same arguments and errors."""
        if logits.ndim != 1 or not len(logits):
            raise ValueError(f"logits must have the shape [n], got {logits.shape}")
        scores = np.asarray(logits[: self.vocab_size], dtype=np.float32)
        settings = self.settings
        edits = self.edits(len(history), banned)
        short = self._short and not edits and len(scores) >= _LARGE
        highest_few = self._highest(scores, history) if short else None
        if highest_few is not None:
            ids, scores = highest_few
            highest = scores[0]
        else:
            check_finite(scores)
            scores = self._adjusted(scores, history, edits)
            if settings.greedy:
                return Candidates(np.array([scores.argmax()]), np.ones(1, dtype=np.float32))
            ids, highest = self._all_ids[: len(scores)], np.maximum.reduce(scores)
            if 0 < settings.top_k < len(scores):
                ids = top_k(scores, settings.top_k)
                scores = scores[ids]
        temperature = 1.0 if settings.temperature_last else settings.temperature
        candidates = Candidates(ids, softmax(scores, highest, temperature, settings.smoothing_factor))
        for step in self._steps:
            if len(candidates.ids) > 1:
                candidates = step(candidates)
        return candidates

    def _can_shortlist(self) -> bool:
        """Whether the highest raw logits suffice: penalties may only lower logits, by an amount that depends only on
        whether the token was seen."""
        s = self.settings
        plain = s.token_repetition_range < 0 and s.token_frequency_penalty == 0.0
        lowers = s.token_repetition_penalty >= 1.0 and s.token_presence_penalty >= 0.0
        penalties = not self._penalties or (plain and lowers)
        others = self._dry or bool(self._bias_of)
        return 0 < s.top_k <= _MOST_SHORT and not s.greedy and not others and penalties

    def _highest(self, scores: FloatArray, history: Sequence[int]) -> tuple[IntArray, FloatArray] | None:
        """Ids and values of the `top_k` highest logits after penalties, from a shortlist of the highest before.

        None if penalties lowered so many of the shortlist that a token outside it may rank higher.
        """
        k = self.settings.top_k
        if not math.isfinite(np.minimum.reduce(scores)):
            check_finite(scores)
        ids, bound = shortlist(scores, 2 * k if self._penalties else k)
        values = scores[ids]
        if self._penalties:
            values = lowered(values, bound, self._history.seen(history)[ids], self.settings)
        order = best(values, k)
        values = values[order]
        if not math.isfinite(values[0]):
            check_finite(scores)
        # Tokens outside the shortlist are below the bound, and penalties do not raise them.
        return (ids[order], values) if values[-1] >= bound else None

    def _adjusted(self, scores: FloatArray, history: Sequence[int], edits: Mapping[int, float]) -> FloatArray:
        """The logits after penalties, bans, bias and DRY; a copy if anything changes."""
        if not (self.reads_history or edits):
            return scores
        scores, past = scores.copy(), self._history.read(history)
        if self._penalties:
            penalize(scores, past, self.settings)
        if edits:
            ids, biases = np.array([*edits], dtype=np.int64), np.array([*edits.values()], dtype=np.float32)
            inside = ids < len(scores)
            add_bias(scores, ids[inside], biases[inside])
            if all_ruled_out(np.maximum.reduce(scores)):
                raise UsageError("every token is banned", f"ban fewer with {param('logit_bias')}")
        if self._dry:
            apply_dry(scores, past, self.breakers, self.settings)
        return scores

    def _filters(self) -> list[Callable[[Candidates], Candidates]]:
        """The enabled steps after the softmax, in exllamav2's order."""
        s = self.settings
        dynamic = s.max_temp > s.min_temp
        steps: list[tuple[bool, Callable[[Candidates], Candidates]]] = [
            (0 < s.top_p < 1, lambda c: top_p(c, s.top_p)),
            (s.top_a > 0, lambda c: top_a(c, s.top_a)),
            (s.min_p > 0, lambda c: min_p(c, s.min_p)),
            (0 < s.tfs < 1, lambda c: tail_free(c, s.tfs)),
            (0 < s.typical < 1, lambda c: typical(c, s.typical)),
            (s.mirostat, lambda c: surprise_limit(c, self.bits)),
            (dynamic, lambda c: dynamic_temperature(c, s.min_temp, s.max_temp, s.temp_exponent)),
            (s.temperature_last and not dynamic, lambda c: retemper(c, s.temperature)),
            (s.xtc_probability > 0, lambda c: xtc(c, s.xtc_probability, s.xtc_threshold, self.protected)),
            (s.skew != 0, descending),
        ]
        return [step for on, step in steps if on]


class History:
    """A token history mirrored in NumPy arrays, updated incrementally while it grows and from scratch when it shrinks.

    Args:
        vocab_size: larger ids are not marked as seen.
    """

    def __init__(self, vocab_size: int) -> None:
        self._tokens = np.empty(256, dtype=np.int64)
        self._seen = np.zeros(vocab_size, dtype=np.bool_)
        self._length = self._read = self._marked = 0

    def read(self, history: Sequence[int]) -> IntArray:
        """The history, [n]: a view, valid until the next call."""
        n = self._begin(history)
        if n > len(self._tokens):
            self._tokens = np.concatenate([self._tokens[: self._read], np.empty(2 * n - self._read, dtype=np.int64)])
        self._tokens[self._read : n] = history[self._read :]
        self._read = n
        return self._tokens[:n]

    def seen(self, history: Sequence[int]) -> BoolArray:
        """Mask of the tokens that occur, [vocab_size]; valid until the next call."""
        n = self._begin(history)
        if n == self._marked + 1:  # the usual case, ten times faster
            if history[-1] < len(self._seen):
                self._seen[history[-1]] = True
        elif n > self._marked:
            new = np.array(history[self._marked :], dtype=np.int64)
            self._seen[new[new < len(self._seen)]] = True
        self._marked = n
        return self._seen

    def _begin(self, history: Sequence[int]) -> int:
        n = len(history)
        if n < self._length:
            self._read = self._marked = 0
            self._seen[:] = False
        self._length = n
        return n


def check_finite(scores: FloatArray) -> None:
    """Raise EngineError if a logit is NaN or infinite."""
    if not np.isfinite(scores).all():
        nans = int(np.isnan(scores).sum())
        what = f"NaN: {nans} of {len(scores)} logits are not numbers" if nans else "infinite logits"
        raise EngineError(
            f"the model produced {what}",
            "download it again if its files are damaged, or try another engine: activations may overflow float16",
        )


class Samplers:
    """Makes the samplers for one model.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: rows of the model's output layer; ids unknown to the tokenizer are never sampled.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = min(tokenizer.vocab_size, vocab_size)

    def make(self, request: Request) -> Sampler:
        return Sampler(
            request.sampling,
            request.seed,
            vocab_size=self._vocab_size,
            breakers=lambda: self._breakers(request.dry_sequence_breakers),
            protected=lambda: xtc_protected(self._pieces, self._tokenizer.special_ids()),
            bias=request.logit_bias,
            min_length=len(request.ids) + request.min_new_tokens if request.min_new_tokens else 0,
            end_ids=request.stop_ids,
        )

    def outputs(self, request: Request) -> OutputTokens | None:
        """Log-probabilities and banned strings of a request; None if it asks for neither."""
        if request.logprobs is None and not request.banned_strings:
            return None
        return OutputTokens(request, self._tokenizer.decode_stream, self._vocab_size)

    def prompt_logprobs(self, request: Request, begin: int, logits: FloatArray) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt tokens after position `begin`; `logits` are those from `begin` on."""
        following = request.ids[begin + 1 : begin + 1 + len(logits)]
        count = request.prompt_logprobs or 0
        return [token_logprobs(row, id_, count, self._vocab_size) for row, id_ in zip(logits, following, strict=False)]

    def _breakers(self, texts: Collection[str] | None) -> frozenset[int]:
        """DRY's sequence breakers. As in TabbyAPI, the last token of each given string counts too."""
        special = self._tokenizer.special_ids()
        if texts is None:
            return dry_breakers(self._pieces, special)
        last = [self._tokenizer.encode(text, add_special_tokens=False)[-1:] for text in texts]
        return dry_breakers(self._pieces, special, texts).union(*last)

    @cached_property
    def _pieces(self) -> list[str]:
        return self._tokenizer.pieces()
