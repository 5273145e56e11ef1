"""Settings of the privacy attack."""

from __future__ import annotations

from pydantic import Field

from mta.config import Settings


class AttackSettings(Settings):
    """How a bank is attacked: ``targets`` people outside the bank are personalized from their first ``shots`` items.

    Then every model is scored on items that the anchors were trained on, at most ``items`` per anchor.
    """

    shots: int = Field(default=8, ge=1, description="first items of a target person")
    targets: int = Field(default=16, ge=1, description="people who are personalized and attacked")
    items: int = Field(default=16, ge=1, description="items of each anchor to score")
