"""The result of one check, and the verdict that follows from all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warn", "fail", "skip"]
Verdict = Literal["gpu", "cpu", "none"]


@dataclass(frozen=True)
class CheckResult:
    """One line of the checklist.

    Attributes:
        check: heads the line.
        status: "ok", "warn" (works, but worse than it could), "fail" (stands in the way), "skip" (does not apply here).
        message: one line.
        fix: the command or step that mends it; empty where nothing is to be done.
        blocks: what cannot work because of it: "gpu", "all" or nothing.
        details: the same for programs.
    """

    check: str
    status: Status
    message: str
    fix: str = ""
    blocks: Literal["", "gpu", "all"] = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without the details where there are none."""
        fixed = {"check": self.check, "status": self.status, "found": self.message}
        details = {"details": self.details} if self.details else {}
        return {**fixed, "fix": self.fix or None, "blocks": self.blocks or None, **details}


def verdict(results: Iterable[CheckResult]) -> Verdict:
    """Where `exl run` will work."""
    blocked = {result.blocks for result in results}
    return "none" if "all" in blocked else "cpu" if "gpu" in blocked else "gpu"
