"""LangChain's ExLlamaV2 notebook, its cells from top to bottom, and what it could not do: streaming, async, threads.

    python tests/gpu/notebook.py [MODEL]

MODEL is a folder; without it the built-in model is used. Exits with 1 where two threads' texts were mixed or the memory
was not given back.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from langchain_core.callbacks import StreamingStdOutCallbackHandler
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnablePassthrough

from exl_cli import Sampling, download, load, loader
from exl_cli.langchain import ChatExLlamaV2, ExLlamaV2

TEMPLATE = """Question: {question}

Answer: Let's think step by step."""
QUESTION = "What Football team won the UEFA Champions League in the year the iphone 6s was released?"


def cell(title: str) -> None:
    print(f"\n--- {title} ---", flush=True)


def upstream_settings() -> Any:
    """exllamav2's own settings object where it can be imported, as in the notebook; else ours."""
    try:
        from exllamav2.generator import ExLlamaV2Sampler
    except Exception as error:  # importing it without a GPU or a compiler fails in many ways
        print(f"(no exllamav2 here: {type(error).__name__}; its settings object is replaced by a Sampling)")
        return Sampling(temperature=0.85, top_k=50, top_p=0.8, token_repetition_penalty=1.05)
    settings = ExLlamaV2Sampler.Settings()
    settings.temperature = 0.85
    settings.top_k = 50
    settings.top_p = 0.8
    settings.token_repetition_penalty = 1.05
    return settings


def nvidia_smi() -> None:
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    else:
        print("(no nvidia-smi here)")


def gpu_bytes() -> int:
    import torch

    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def fetched(folder: Path, models: Path) -> str:
    """The model by the notebook's helper, which finds it in its place."""
    (models / f"local_{folder.name}").symlink_to(folder)
    return download(f"local/{folder.name}", models_dir=models)


def as_in_the_notebook(model_path: str) -> ExLlamaV2:
    prompt = PromptTemplate(template=TEMPLATE, input_variables=["question"])
    llm = ExLlamaV2(
        model_path=model_path,
        callbacks=[StreamingStdOutCallbackHandler()],
        verbose=True,
        settings=upstream_settings(),
        streaming=True,
        max_new_tokens=150,
    )
    chain = RunnablePassthrough.assign(text=prompt | llm)
    print(chain.invoke({"question": QUESTION}))
    return llm


async def asynchronously(llm: ExLlamaV2) -> None:
    async for piece in llm.astream("Once upon a time", max_new_tokens=20):
        print(piece, end="|", flush=True)
    print()
    print(await llm.abatch(["One", "Two", "Three"], max_new_tokens=10))


def two_threads(model_path: str) -> bool:
    """Whether two threads that stream at once get what each gets alone, up to where two tokens nearly tie."""
    prompts = ["Once upon a time", "The capital of France is"]
    with load(model_path) as model:

        def read(prompt: str) -> tuple[int, ...]:
            stream = model.stream(prompt, temperature=0.0, token_repetition_penalty=1.0, max_new_tokens=60)
            pieces = list(stream)
            if "".join(pieces) != stream.result().text:
                raise RuntimeError("pieces and result differ")
            return stream.result().token_ids

        alone = [read(prompt) for prompt in prompts]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(read, prompts))
    shared = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
        for a, b in zip(alone, together, strict=True)
    ]
    print(f"tokens alone {[len(ids) for ids in alone]}, of them the same at once {shared}")
    return all(count >= min(10, len(ids)) for count, ids in zip(shared, alone, strict=True))


def main() -> int:
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else loader.resolve(None).path
    with tempfile.TemporaryDirectory() as models:
        cell("download, load, ask")
        model_path = fetched(folder, Path(models))
        llm = as_in_the_notebook(model_path)
        cell("nvidia-smi, the model loaded")
        nvidia_smi()
        cell("stream, up to the first full stop")
        quiet = ExLlamaV2(model_path=model_path, max_new_tokens=60)
        for piece in quiet.stream("Once upon a time", stop=["."]):
            print(piece, end="|", flush=True)
        cell("async")
        asyncio.run(asynchronously(quiet))
        cell("chat, from the same engine")
        chat = ChatExLlamaV2(model=model_path, temperature=0.7, max_tokens=60)
        answer = chat.invoke([("human", "Tell me a very short story.")])
        print(answer.content)
        print(answer.usage_metadata)
        print(answer.response_metadata)
        cell("release, nvidia-smi")
        held = gpu_bytes()
        for user in (llm, quiet, chat):
            user.release()
        left = gpu_bytes()
        print(f"reserved by torch: {held / 2**20:.0f} MiB, then {left / 2**20:.0f} MiB")
        nvidia_smi()
        cell("two threads, one engine")
        unmixed = two_threads(model_path)
    print("not mixed" if unmixed else "MIXED")
    return 0 if unmixed and (left < held / 4 or not held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
