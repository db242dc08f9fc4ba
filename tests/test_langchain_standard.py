"""langchain-tests' standard suite for chat models, on the built-in model, offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_core", reason="needs exl-cli[langchain]")
pytest.importorskip("langchain_tests", reason="needs exl-cli[test]")

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from shallow import shallow, shallow_gptq

from exl_cli.langchain import ChatExLlamaV2

DATA = Path(__file__).parent / "data"

# The suites' own asynchronous tests carry no mark; the synchronous ones beside them need none.
pytestmark = [pytest.mark.asyncio, pytest.mark.filterwarnings("ignore:.*is marked with '@pytest.mark.asyncio'")]

PARAMETERS: dict[str, Any] = {"model": str(shallow()), "engine": "cpu", "seed": 5}
ANOTHER = str(shallow_gptq())


@pytest.fixture(scope="module", autouse=True)
def keep_engines() -> Iterator[None]:
    """Every object of the suites uses these two's engines, as any two objects in a process would."""
    kept = [ChatExLlamaV2(**PARAMETERS), ChatExLlamaV2(**{**PARAMETERS, "model": ANOTHER})]
    yield
    for model in kept:
        model.release()


@pytest.fixture
def vcr() -> None:
    """What `enable_vcr_tests` leaves unused."""


class Capabilities:
    """What both suites ask: a chat model of text, without tools."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatExLlamaV2

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return PARAMETERS

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        # Few tokens: what is tested is how they arrive.
        return {**super().standard_chat_model_params, "max_tokens": 12}

    @property
    def has_tool_calling(self) -> bool:
        return False  # nothing makes a model write a call that can be parsed: that takes output bound to a grammar

    @property
    def has_tool_choice(self) -> bool:
        return False  # no tools, so none to choose

    @property
    def has_structured_output(self) -> bool:
        return False  # as for tools: no grammar, no schema

    @property
    def supports_json_mode(self) -> bool:
        return False  # as for tools

    @property
    def supports_image_inputs(self) -> bool:
        return False  # exl runs the text part of a model only

    supports_image_urls = supports_pdf_inputs = supports_audio_inputs = supports_video_inputs = supports_image_inputs
    supports_image_tool_message = supports_pdf_tool_message = supports_image_inputs

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False  # tool_use and tool_result blocks: no tools

    @property
    def enable_vcr_tests(self) -> bool:
        return False  # they replay recorded network traffic; there is none

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        # Not the others: no audio, reasoning is not told apart from the answer, nothing fills the KV cache ahead.
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    @property
    def model_override_value(self) -> str:
        return ANOTHER


# `test_serdes` skips itself: a saved object would name a folder of this machine, so the classes cannot be saved.


class TestUnit(Capabilities, ChatModelUnitTests):
    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        given = {**PARAMETERS, "model": "fable-7m-gptq"}
        return {"EXL_MODELS_DIR": str(DATA)}, given, {"path": DATA / "fable-7m-gptq"}


class TestIntegration(Capabilities, ChatModelIntegrationTests):
    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatExLlamaV2(**PARAMETERS, max_tokens=12)
        model.invoke("Write me 2 haikus.")
        if not stream:
            return model.invoke("Write me 2 haikus.")
        first, *others = model.stream("Write me 2 haikus.")
        for chunk in others:
            first += chunk
        return first
