"""What callers learn of an error: the response, and a message without paths, versions, and other people's ids."""

from __future__ import annotations

import logging

from mta.errors import MtaError, OtherBank, PersonForgotten, PersonNotFound, StateCorrupt, StoreConflict, StoreError
from mta.serving.api.schemas import error_body
from mta.serving.engine import AnswerLost, EngineGone, ModelRemoved, QueueFull, Refused

log = logging.getLogger("mta")


class NeedsRebuild(MtaError):
    """The task LoRA or bank still contains a forgotten person, and ``--strict`` refuses to serve it."""


class UnknownOrForbidden(PersonNotFound):
    """The person is unknown, or the key may not see the person; both give the same answer."""


_OF_OTHER_BANK = "the person's state was made with another bank. Personalize the person again, or send fallback: task"
_FORGOTTEN = "the person was forgotten during this request: nothing was saved. Send the request again if wanted"
_NO_STORE = "the store of people's models does not answer. Send the request again in a few seconds"
_Answer = tuple[int, str | None, int | None, str | None]
# Status, code, seconds after which to retry, and what callers may read; None: the error's own message and hint.
_ANSWERS: dict[type[MtaError], _Answer] = {
    UnknownOrForbidden: (404, "model_not_found", None, None),
    PersonNotFound: (404, "model_not_found", None, "the person no longer exists"),
    PersonForgotten: (409, "person_forgotten", None, _FORGOTTEN),
    QueueFull: (429, "queue_full", 1, None),
    OtherBank: (503, "other_bank", None, _OF_OTHER_BANK),
    NeedsRebuild: (503, "needs_rebuild", None, None),
    StoreConflict: (500, "StoreConflict", None, "a newer state of the person was saved meanwhile"),
    StateCorrupt: (500, "StateCorrupt", None, "the stored state could not be read or saved"),
    StoreError: (503, "store_unavailable", 5, _NO_STORE),
    ModelRemoved: (409, "model_removed", None, None),
    EngineGone: (503, "engine_gone", 5, None),
    AnswerLost: (500, "answer_lost", None, None),
    Refused: (400, None, None, None),
}


def _answer_of(error: MtaError) -> _Answer:
    """Return the answer of the error's first class in the table; for others, callers learn only the class."""
    hidden = 500, type(error).__name__, None, "the request failed in the server"
    return next((answer for kind, answer in _ANSWERS.items() if isinstance(error, kind)), hidden)


def public_message(error: MtaError) -> str:
    """Return what callers may read of an error, with the hint only if it is written for callers."""
    return _answer_of(error)[3] or f"{error.message}. {error.hint}"


def status_of(error: MtaError) -> int:
    """Return the HTTP status of an error."""
    return _answer_of(error)[0]


def error_of(error: MtaError) -> tuple[int, dict[str, object], dict[str, str]]:
    """Return status, body, and headers for an error; log one whose message is hidden."""
    status, code, retry, hidden = _answer_of(error)
    if hidden and status >= 500:
        log.error("a request failed: %s", type(error).__name__)  # its message may hold paths
    kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = error.code if isinstance(error, Refused) else code
    body = error_body(public_message(error), kind, code, "model" if status == 404 else None)
    return status, body, {"Retry-After": str(retry)} if retry else {}
