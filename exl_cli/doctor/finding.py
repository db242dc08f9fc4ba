"""What a check found, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warn", "fail", "skip"]
Verdict = Literal["gpu", "cpu", "none"]


@dataclass(frozen=True)
class Finding:
    """One line of the checklist.

    Attributes:
        check: what was looked at, as the line is headed.
        status: "ok", "warn" (works, but worse than it could), "fail" (stands in the way), "skip" (does not apply here).
        found: what was found, in one line.
        fix: the command that mends it, or the next step where there is none; empty where nothing is to be done.
        blocks: what cannot work because of it: "gpu", "all" or nothing.
        details: the same for programs.
    """

    check: str
    status: Status
    found: str
    fix: str = ""
    blocks: Literal["", "gpu", "all"] = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "check": self.check,
            "status": self.status,
            "found": self.found,
            "fix": self.fix or None,
            "blocks": self.blocks or None,
            **({"details": self.details} if self.details else {}),
        }


def verdict(findings: Sequence[Finding]) -> Verdict:
    """Where `exl run` will work."""
    blocked = {finding.blocks for finding in findings}
    return "none" if "all" in blocked else "cpu" if "gpu" in blocked else "gpu"
