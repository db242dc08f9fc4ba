"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from exl_cli.errors import param
from exl_cli.system.questions import Answer

Status = Literal["ok", "warn", "fail", "skip"]


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


def patience(answer: Answer, otherwise: str) -> str:
    """The next step after a question without an answer: more patience where it hung."""
    slow = f"exl doctor {param('timeout')} 300, in case this machine is slow"
    return slow if answer.kind == "hang" else otherwise
