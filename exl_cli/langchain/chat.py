"""`ChatExLlamaV2`: messages in, a message out, through the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from exl_cli.api.streams import Generation as Response
from exl_cli.errors import PromptError
from exl_cli.langchain.local import Call, LocalModel


class ChatExLlamaV2(LocalModel, BaseChatModel):
    """A GPTQ, EXL2 or float model that answers messages.

        chat = ChatExLlamaV2(model="./models/owner_name", temperature=0.7, max_tokens=200)
        chat.invoke([("system", "Answer in one sentence."), ("human", "Who are you?")])

    Per call, `stop`, `max_tokens`, `seed`, `timeout`, `settings`, every field of `Sampling` and another `model` can be
    given, also with `bind`. Tools and structured output are not offered: nothing here makes a model keep to a schema.
    """

    model_config = LocalModel.model_config

    streaming: bool = False
    """Generate by streaming, so that callbacks are told of every new token, also when the whole answer is asked for."""

    @property
    def _llm_type(self) -> str:
        return "exllamav2-chat"

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """How many tokens the messages come to in the model's chat template, the header of the answer included."""
        with self._calling(None, {"tools": tools or None}) as call:
            return len(call.model.encode(_turns(messages)))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self._calling(stop, kwargs) as call, call.stream(_turns(messages)) as stream:
            return _result(call, stream.result())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        async with self._acalling(stop, kwargs) as call, call.astream(_turns(messages)) as stream:
            return _result(call, await stream.result())

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._calling(stop, kwargs) as call, call.stream(_turns(messages)) as stream:
            for text in stream:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
                if run_manager:
                    run_manager.on_llm_new_token(text, chunk=chunk)
                yield chunk
            yield _last_chunk(call, stream.result())

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with self._acalling(stop, kwargs) as call, call.astream(_turns(messages)) as stream:
            async for text in stream:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
                if run_manager:
                    await run_manager.on_llm_new_token(text, chunk=chunk)
                yield chunk
            yield _last_chunk(call, await stream.result())


def _result(call: Call, response: Response) -> ChatResult:
    message = AIMessage(content=response.text, response_metadata=call.facts(response), usage_metadata=_usage(response))
    return ChatResult(generations=[ChatGeneration(message=message)])


def _last_chunk(call: Call, response: Response) -> ChatGenerationChunk:
    """Without text, so that usage and metadata, which add up over chunks, come exactly once."""
    return ChatGenerationChunk(
        message=AIMessageChunk(
            content="",
            response_metadata=call.facts(response),
            usage_metadata=_usage(response),
            chunk_position="last",
        )
    )


def _usage(response: Response) -> UsageMetadata:
    summary = response.summary
    return UsageMetadata(
        input_tokens=summary.prompt_tokens,
        output_tokens=summary.new_tokens,
        total_tokens=summary.prompt_tokens + summary.new_tokens,
        input_token_details=InputTokenDetails(cache_read=summary.reused_tokens),
    )


def _turns(messages: list[BaseMessage]) -> list[dict[str, Any]]:
    """LangChain's messages as chat templates know them (the format of OpenAI's API, with a call's arguments parsed).

    Raises:
        PromptError: a message holds something else than text.
    """
    turns = convert_to_openai_messages(messages, text_format="block")
    return [_turn(turn) for turn in (turns if isinstance(turns, list) else [turns])]


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    blocks = turn.get("content") or []
    if isinstance(blocks, str):
        blocks = [{"type": "text", "text": blocks}]
    if other := sorted({str(block["type"]) for block in blocks} - {"text"}):
        raise PromptError(f"a message holds {', '.join(other)}, and models in exl read text only", "send text")
    turn = {**turn, "content": "".join(block["text"] for block in blocks)}
    if calls := turn.get("tool_calls"):
        functions = [{**call["function"], "arguments": json.loads(call["function"]["arguments"])} for call in calls]
        turn["tool_calls"] = [{**call, "function": f} for call, f in zip(calls, functions, strict=True)]
    return turn
