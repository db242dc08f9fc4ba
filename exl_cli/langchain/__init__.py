"""LangChain integration: `ExLlamaV2` completes text, `ChatExLlamaV2` answers messages.

    pip install 'exl-cli[langchain]'

Objects with the same model and load options share one engine per process. It is closed when the last of them is
released (`release()`) or garbage-collected.
"""

try:
    import langchain_core as _  # noqa: F401
except ImportError as error:
    raise ImportError("exl_cli.langchain needs langchain-core; run pip install 'exl-cli[langchain]'") from error

from exl_cli.langchain.chat import ChatExLlamaV2
from exl_cli.langchain.llm import ExLlamaV2

__all__ = ["ChatExLlamaV2", "ExLlamaV2"]
