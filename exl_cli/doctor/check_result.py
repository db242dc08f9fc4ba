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
        check: the line's title.
        status: "ok", "warn" (works, but not as well as it could), "fail" (does not work), "skip" (does not apply).
        message: one line.
        fix: a command or step that fixes it, or empty.
        blocks: what cannot work because of it: "gpu", "all" or nothing.
        details: machine-readable values, for --json.
    """

    check: str
    status: Status
    message: str
    fix: str = ""
    blocks: Literal["", "gpu", "all"] = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        fixed = {"check": self.check, "status": self.status, "found": self.message}
        details = {"details": self.details} if self.details else {}
        return {**fixed, "fix": self.fix or None, "blocks": self.blocks or None, **details}


def patience(answer: Answer, otherwise: str) -> str:
    """The fix for a failed probe: a longer time limit if it hung, else `otherwise`."""
    slow = f"exl doctor {param('timeout')} 300 (in case this machine is slow)"
    return slow if answer.kind == "hang" else otherwise
