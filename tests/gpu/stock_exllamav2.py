"""The baseline of `fast_path.py`: generation by exllamav2's own API as it comes, in a process of its own.

    python tests/gpu/stock_exllamav2.py MODEL [--prompt-tokens 512] [--new-tokens 256] [--runs 3]

Every run has a prompt of its own (seed 1234), so that nothing is found in the cache, and the sampler settings of the
LangChain notebook without end-of-sequence. Prints one JSON object: for each run the time to the first token and tokens
a second after it; seconds of import, load and the whole process; peak memory of torch's allocator.
"""

from __future__ import annotations

import argparse
import json
import time

STARTED = time.perf_counter()

import torch  # noqa: E402
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer  # noqa: E402
from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob, ExLlamaV2Sampler  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    imported = time.perf_counter()

    config = ExLlamaV2Config(args.model)
    config.max_seq_len = 4096
    config.arch_compat_overrides()
    model = ExLlamaV2(config)
    cache = ExLlamaV2Cache(model, max_seq_len=4096, lazy=True)
    model.load_autosplit(cache)
    tokenizer = ExLlamaV2Tokenizer(config)
    generator = ExLlamaV2DynamicGenerator(model=model, cache=cache, tokenizer=tokenizer, paged=False)
    torch.cuda.synchronize()
    loaded = time.perf_counter()

    random = torch.Generator().manual_seed(1234)
    runs = []
    for _ in range(args.runs):
        prompt = torch.randint(100, min(30000, config.vocab_size), (1, args.prompt_tokens), generator=random)
        settings = ExLlamaV2Sampler.Settings(temperature=0.85, top_k=50, top_p=0.8, token_repetition_penalty=1.05)
        settings.disallow_tokens(tokenizer, [tokenizer.eos_token_id])
        generator.enqueue(ExLlamaV2DynamicJob(input_ids=prompt, max_new_tokens=args.new_tokens, gen_settings=settings))
        begin = time.perf_counter()
        first = 0.0
        while generator.num_remaining_jobs():
            stages = [result["stage"] for result in generator.iterate()]
            first = first or ("streaming" in stages and time.perf_counter())
        end = time.perf_counter()
        runs.append(
            {"first_token_s": first - begin, "rate": (args.new_tokens - 1) / (end - first), "all_s": end - begin}
        )
    print(
        json.dumps(
            {
                "runs": runs,
                "import_s": imported - STARTED,
                "load_s": loaded - imported,
                "process_s": time.perf_counter() - STARTED,
                "peak_bytes": torch.cuda.max_memory_allocated(),
            }
        )
    )


if __name__ == "__main__":
    main()
