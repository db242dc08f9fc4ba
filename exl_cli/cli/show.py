"""`exl show`: describe a model without loading it."""

from __future__ import annotations

from exl_cli import loader
from exl_cli.api import records
from exl_cli.cli.options import Json, Model, ModelsDir
from exl_cli.engines.exllamav2 import support
from exl_cli.errors import ExlError
from exl_cli.models import folders, memory, placement
from exl_cli.models.chat_template import load_chat_template
from exl_cli.models.hub import store
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.ui import models
from exl_cli.ui.console import Console

_CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)


def show(model: Model = None, models_dir: ModelsDir = None, as_json: Json = False) -> None:
    """Show a model's format, size, licence, chat template and estimated GPU memory."""
    console = Console()
    info = loader.resolve(model, models_dir)
    marker = store.read_marker(info.path)
    entry = folders.Entry(info.name, info.path, folders.folder_bytes(info.path, linked=True), info, marker=marker)
    for note in info.notes:
        console.note(note)
    template = None
    try:
        template = load_chat_template(info.path)
        problem = template.problem() if template else ""
    except ExlError as error:
        problem = str(error)
    if problem:
        console.note(problem)
    source = template.source if template else ""
    licence = folders.licence(info.path, marker)
    why_not = support.why_not(info)
    estimates = {} if why_not else _estimates(info)
    gpus = memory.gpus() if estimates else []
    context = loader.context_to_allocate(info, LoadOptions())
    needed = memory.estimate(info, context) if gpus else None
    shares = placement.split(needed, [gpu.total - memory.CUDA_CONTEXT for gpu in gpus]) if needed else None
    if as_json:
        console.data(records.model(info, entry, licence, why_not, source, estimates, shares or ()))
        return
    models.show_facts(console, info, entry, licence, why_not)
    if estimates:
        models.show_estimates(console, estimates, gpus)
    if shares and len(shares) > 1:
        models.show_shares(console, shares, gpus, context)
    if source:
        models.preview(console, "Chat template", source)


def _estimates(info: ModelInfo) -> dict[int, dict[str, memory.Estimate]]:
    """Memory estimates by context and cache type, up to the model's longest context."""
    longest = info.extended_length
    contexts = sorted({*(context for context in _CONTEXTS if context < longest), info.context_length, longest})
    estimates = {
        context: {cache: memory.estimate(info, context, cache) for cache in memory.CACHE_TYPES} for context in contexts
    }
    return {
        context: {cache: needed for cache, needed in row.items() if needed}
        for context, row in estimates.items()
        if any(row.values())
    }
