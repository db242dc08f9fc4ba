"""How much sooner a chat's second turn begins to answer than a prompt of the same length that nothing is known of.

    python tests/gpu/chat_reuse.py MODEL [--tokens 1500] [--message 12] [--turns 5] [--engine auto] [--cache fp16]
        [--least 5]

Each turn is measured once warm (the conversation so far is in the KV cache) and once cold (another text of as many
tokens), after one unmeasured round. Then the same turn is computed once more, cold: its greedy tokens should be those
of the warm one, up to a near tie. Prints one JSON object: medians of the time to the first token in seconds, how many
times sooner the warm one is, the tokens reused and those that were new, and how many tokens at the beginning of the
answers agreed, of how many. Ends with status 1 where the warm one is less than --least times sooner.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.chat.prompt_encoder import PromptEncoder
from exl_cli.engines.base import Request, Summary
from exl_cli.models.chat_template import load_format
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build

_ANSWER = 32
_COMPARED = 16
_WORDS = ("the", "a", "fox", "river", "under", "house", "went", "seven", "lantern", "quiet", "of", "and", "then", "old")


class _Silent:
    """A `loader.Observer` that keeps stdout for the figures."""

    def note(self, message: str) -> None:
        sys.stderr.write(message + "\n")

    def progress(self, done: int, total: int) -> None:
        pass


def generate(
    engine: EngineThread, ids: Sequence[int], tokens: int, preset: str = "greedy"
) -> tuple[str, list[int], Summary]:
    """To the last token."""
    chunks = list(engine.stream(Request(ids, build({}, preset), tokens, 0)))
    summary = chunks[-1].summary
    if summary is None:
        raise RuntimeError("no summary")
    return "".join(chunk.text for chunk in chunks), [id_ for chunk in chunks for id_ in chunk.token_ids], summary


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("model")
    args.add_argument("--tokens", type=int, default=1500)
    args.add_argument("--message", type=int, default=12, help="tokens of the second message, give or take four")
    args.add_argument("--turns", type=int, default=5)
    args.add_argument("--engine", default="auto")
    args.add_argument("--cache", default="fp16")
    args.add_argument("--least", type=float, default=0.0)
    given = args.parse_args()

    info = loader.resolve(given.model)
    tokenizer = Tokenizer(info.path)
    chat = load_format(info.path)
    context = given.tokens + _ANSWER + 64
    options = LoadOptions(given.engine, max_seq_len=context, cache=given.cache)
    engine = EngineThread(loader.load(info, tokenizer, options, _Silent()))
    rng = random.Random(0)

    def words(count: int) -> str:
        text = " ".join(rng.choices(_WORDS, k=2 * count))
        ids = tokenizer.encode(text, add_special_tokens=False)[:count]
        return tokenizer.decode(ids)

    def turn() -> tuple[Summary, Summary, int]:
        encoder = PromptEncoder(tokenizer, add_special_tokens=chat.add_special_tokens)
        messages = [{"role": "user", "content": words(given.tokens - _ANSWER - 60)}]
        first = encoder.encode(chat.render(messages))
        # Random weights may have nothing but a special token for their likeliest, and a conversation has none in it.
        answer, ids, _ = generate(engine, first.ids, _ANSWER, "notebook")
        encoder.computed(first, ids, answer)
        message = words(rng.randint(given.message - 4, given.message + 4))
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": message}]
        second = encoder.encode(chat.render(messages))
        _, tokens, warm = generate(engine, second.ids, _COMPARED)
        other = tokenizer.encode(words(2 * given.tokens), add_special_tokens=False)[: len(second.ids)]
        _, _, cold = generate(engine, other, _COMPARED)
        _, again, _ = generate(engine, second.ids, _COMPARED)
        agreed = next((i for i, (a, b) in enumerate(zip(tokens, again, strict=True)) if a != b), _COMPARED)
        return warm, cold, agreed

    turn()
    turns = [turn() for _ in range(given.turns)]
    warm = statistics.median(one.first_token_seconds for one, _, _ in turns)
    cold = statistics.median(one.first_token_seconds for _, one, _ in turns)
    figures = {
        "model": info.name,
        "format": info.format_name,
        "engine": {"name": engine.name, **engine.facts},
        "prompt_tokens": [one.prompt_tokens for one, _, _ in turns],
        "reused_tokens": [one.reused_tokens for one, _, _ in turns],
        "new_tokens": [one.prompt_tokens - one.reused_tokens for one, _, _ in turns],
        "cold_reused_tokens": [one.reused_tokens for _, one, _ in turns],
        "warm_first_token_seconds": round(warm, 5),
        "cold_first_token_seconds": round(cold, 5),
        "times_sooner": round(cold / warm, 2),
        "agreed_tokens": [agreed for _, _, agreed in turns],
        "compared_tokens": _COMPARED,
    }
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    engine.close()
    return 0 if cold / warm >= given.least else 1


if __name__ == "__main__":
    sys.exit(main())
