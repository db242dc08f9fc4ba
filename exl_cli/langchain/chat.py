"""`ChatExLlamaV2`: chat with the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list

from exl_cli.api.streams import Generation as Response
from exl_cli.langchain.local import Call, LocalModel, as_prompt
from exl_cli.models.memory import MOST_SEQUENCES


class ChatExLlamaV2(LocalModel, BaseChatModel):  # type: ignore[misc]  # `_stream` names its argument otherwise
    """A LangChain chat model on a GPTQ, EXL2 or float model.

        chat = ChatExLlamaV2(model="./models/owner_name", temperature=0.7, max_tokens=200)
        chat.invoke([("system", "Answer in one sentence."), ("human", "Who are you?")])

    Calls and `bind` accept `stop`, `max_tokens`, `seed`, `timeout`, `settings`, any field of `Sampling`, and another
    `model`. Tools and structured output are not supported, since generation is not constrained.
    """

    model_config = LocalModel.model_config

    streaming: bool = False
    """Stream even for `invoke`, with a callback for every new token."""

    @property
    def _llm_type(self) -> str:
        return "exllamav2-chat"

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Number of tokens of the rendered messages, including the header of the response."""
        with self._calling(None, {"tools": tools or None}) as call:
            return len(call.model.encode(as_prompt(messages)))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self._calling(stop, kwargs) as call, call.stream(messages) as stream:
            return _result(call, stream.result())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        async with self._acalling(stop, kwargs) as call, call.astream(messages) as stream:
            return _result(call, await stream.result())

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """See `Runnable.batch`; at most as many at a time as a forward pass computes, or `max_concurrency`.

        LangChain would start four threads more than there are cores. Here they only wait for the engine.
        """
        configs = get_config_list(config, len(inputs))
        for each in configs:
            each.setdefault("max_concurrency", MOST_SEQUENCES)
        return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def _chunk(self, text: str) -> ChatGenerationChunk:
        return ChatGenerationChunk(message=AIMessageChunk(content=text))

    def _last_chunk(self, call: Call, response: Response) -> ChatGenerationChunk:
        return ChatGenerationChunk(
            message=AIMessageChunk(content="", chunk_position="last", **_metadata(call, response))
        )


def _result(call: Call, response: Response) -> ChatResult:
    return ChatResult(
        generations=[ChatGeneration(message=AIMessage(content=response.text, **_metadata(call, response)))]
    )


def _metadata(call: Call, response: Response) -> dict[str, Any]:
    summary = response.summary
    usage = UsageMetadata(
        input_tokens=summary.prompt_tokens,
        output_tokens=summary.new_tokens,
        total_tokens=summary.prompt_tokens + summary.new_tokens,
        input_token_details=InputTokenDetails(cache_read=summary.reused_tokens),
    )
    return {"response_metadata": call.facts(response), "usage_metadata": usage}
