"""Package a compiled extension as a wheel, to install on similar machines.

Format: "Binary distribution format" on packaging.python.org. The wheel contains the library under the name that
exllamav2 imports, and its facts, which exl checks before loading it. pip rejects other Pythons, platforms, and versions
of torch and exllamav2.
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

from exl_cli.engines.exllamav2.extension.compiled import FACTS, MODULE, Facts, tag


def write_wheel(library: Path, facts: Facts, folder: Path) -> Path:
    """Write a wheel such as exllamav2_ext-0.3.2+cu130.torch2.11.0.sm90-cp312-cp312-linux_x86_64.whl, atomically."""
    torch = facts.torch.partition("+")[0]
    version = f"{facts.exllamav2}+cu{facts.cuda.replace('.', '')}.torch{torch}.{tag(facts.archs)}"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    kind = f"{python}-{python}-{re.sub('[-.]', '_', sysconfig.get_platform())}"
    info = f"{MODULE}-{version}.dist-info"
    metadata = (
        f"Metadata-Version: 2.1\nName: {MODULE.replace('_', '-')}\nVersion: {version}\n"
        "Summary: exllamav2's compiled extension, made by exl build\n"
        f"Requires-Dist: torch=={torch}\nRequires-Dist: exllamav2=={facts.exllamav2}\n"
    )
    files = {
        f"{MODULE}.{facts.python}.so": library.read_bytes(),
        FACTS: json.dumps(facts.to_dict(), indent=1).encode(),
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: exl\nRoot-Is-Purelib: false\nTag: {kind}\n".encode(),
    }
    record = "".join(f"{path},sha256={_digest(content)},{len(content)}\n" for path, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{MODULE}-{version}-{kind}.whl"
    temporary = folder / f".{wheel.name}.{os.getpid()}.tmp"
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in files.items():
                archive.writestr(path, content)
        temporary.replace(wheel)
    finally:
        temporary.unlink(missing_ok=True)
    return wheel


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
