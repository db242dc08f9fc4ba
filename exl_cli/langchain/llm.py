"""`ExLlamaV2`: text completion; a drop-in replacement for langchain_community's class."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from exl_cli.api import notebook
from exl_cli.api.streams import Generation as Response
from exl_cli.langchain.local import Call, LocalModel


class ExLlamaV2(LocalModel, LLM):
    """A LangChain LLM on a GPTQ, EXL2 or float model.

        llm = ExLlamaV2(model_path="./models/owner_name", settings=Sampling(temperature=0.85), max_new_tokens=150)
        for piece in llm.stream("Once upon a time"): ...

    Calls and `bind` accept `stop`, `max_new_tokens`, `seed`, `timeout`, `settings`, any field of `Sampling`, and
    another `model`. `verbose` prints settings, model and timings to stdout, as in LangChain's notebook.
    """

    model_config = LocalModel.model_config

    streaming: bool = True
    """Call the callbacks for every new token even for `invoke`."""

    @property
    def _llm_type(self) -> str:
        return "ExLlamaV2"

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        return self._generate([prompt], stop, run_manager, **kwargs).generations[0][0].text

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        done: list[Response] = []
        with self._calling(stop, kwargs) as call, ExitStack() as stack:
            # Start all of them: the engine may batch them.
            for stream in [stack.enter_context(call.stream(prompt)) for prompt in prompts]:
                for text in stream:
                    if run_manager and self.streaming:
                        run_manager.on_llm_new_token(text, chunk=GenerationChunk(text=text))
                done.append(self._report(stream.result()))
        return _result(call, done)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        done: list[Response] = []
        with ExitStack() as stack:
            async with self._acalling(stop, kwargs) as call:
                streams = [call.astream(prompt) for prompt in prompts]
                for stream in streams:
                    stack.callback(stream.close)
                for stream in streams:
                    async for text in stream:
                        if run_manager and self.streaming:
                            await run_manager.on_llm_new_token(text, chunk=GenerationChunk(text=text))
                    done.append(self._report(await stream.result()))
        return _result(call, done)

    def _chunk(self, text: str) -> GenerationChunk:
        return GenerationChunk(text=text)

    def _last_chunk(self, call: Call, response: Response) -> GenerationChunk:
        return GenerationChunk(text="", generation_info=call.facts(self._report(response)))

    def _say(self, text: str) -> None:
        if self.verbose:
            notebook.say(text)

    def _report(self, response: Response) -> Response:
        self._say("\n\n" + "\n".join(notebook.timings(response.summary)))
        return response


def _result(call: Call, responses: list[Response]) -> LLMResult:
    generations = [[Generation(text=r.text, generation_info=call.facts(r))] for r in responses]
    prompt, new = (sum(getattr(r.summary, f"{what}_tokens") for r in responses) for what in ("prompt", "new"))
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return LLMResult(generations=[*generations], llm_output={"model_name": call.model_name, "token_usage": usage})
