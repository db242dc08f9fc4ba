"""A compiled extension as a wheel, to be installed on other machines of its kind with `pip install`.

The format is the one of the "Binary distribution format" specification (packaging.python.org). The wheel holds the
library under the name by which exllamav2 looks for it, and beside it what it was made for, which exl reads before it
loads the library; pip itself refuses another Python, platform, torch or exllamav2.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import sysconfig
import zipfile
from pathlib import Path

from exl_cli.engines.exllamav2.extension.compiled import FACTS, MODULE, Facts, capability_of, sm


def name_of(facts: Facts) -> str:
    """The wheel's file name: exllamav2_ext-0.3.2+cu130.torch2.11.0.sm90-cp312-cp312-linux_x86_64.whl."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    return f"{MODULE}-{_version(facts)}-{python}-{python}-{platform}.whl"


def _version(facts: Facts) -> str:
    cuda = "cu" + facts.cuda.replace(".", "")
    archs = ".".join(sm(capability_of(arch)).replace("_", "") for arch in facts.archs)
    return f"{facts.exllamav2}+{cuda}.torch{facts.torch.partition('+')[0]}.{archs}"


def write_wheel(library: Path, facts: Facts, folder: Path) -> Path:
    """Write the wheel.

    Args:
        library: the extension.
        facts: what it was made for.
        folder: where to; it is made.

    Returns:
        The wheel's path.

    Raises:
        OSError: it cannot be written; no part of it is left.
    """
    name = name_of(facts)
    info = f"{MODULE}-{_version(facts)}.dist-info"
    files: dict[str, bytes] = {
        f"{MODULE}.{facts.python}.so": library.read_bytes(),
        FACTS: json.dumps(facts.to_dict(), indent=1).encode(),
        f"{info}/METADATA": _metadata(facts).encode(),
        f"{info}/WHEEL": _wheel(name).encode(),
    }
    record = "".join(f"{path},sha256={_digest(content)},{len(content)}\n" for path, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in files.items():
                archive.writestr(path, content)
        temporary.replace(folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / name


def _metadata(facts: Facts) -> str:
    torch = facts.torch.partition("+")[0]
    return (
        "Metadata-Version: 2.1\n"
        f"Name: {MODULE.replace('_', '-')}\n"
        f"Version: {_version(facts)}\n"
        f"Summary: exllamav2's compiled extension, made by exl build\n"
        f"Requires-Dist: torch=={torch}\n"
        f"Requires-Dist: exllamav2=={facts.exllamav2}\n"
    )


def _wheel(name: str) -> str:
    tag = "-".join(name.removesuffix(".whl").split("-")[-3:])
    return f"Wheel-Version: 1.0\nGenerator: exl\nRoot-Is-Purelib: false\nTag: {tag}\n"


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
