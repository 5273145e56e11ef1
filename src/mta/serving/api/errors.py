"""What callers learn of an error: the response, and a message without paths, versions, and other people's ids."""

from __future__ import annotations

import logging

from mta.errors import (
    Diverged,
    InputError,
    MtaError,
    OtherBank,
    PersonForgotten,
    PersonNotFound,
    StateCorrupt,
    StoreConflict,
    StoreError,
)
from mta.serving.api.schemas import error_body
from mta.serving.engine import AnswerLost, EngineGone, ModelRemoved, QueueFull, Refused

log = logging.getLogger("mta")


class NeedsRebuild(MtaError):
    """The task LoRA or bank still contains a forgotten person, and ``--strict`` refuses to serve it."""


class UnknownOrForbidden(PersonNotFound):
    """The person is unknown, or the key may not see the person; both give the same answer."""


_FOR_CALLERS = UnknownOrForbidden, NeedsRebuild, Refused, QueueFull, ModelRemoved, EngineGone, AnswerLost
# Class of an error: status, type, code, and seconds after which to retry.
_ANSWERS: dict[type[MtaError], tuple[int, str, str | None, int | None]] = {
    PersonNotFound: (404, "invalid_request_error", "model_not_found", None),
    PersonForgotten: (409, "invalid_request_error", "person_forgotten", None),
    QueueFull: (429, "rate_limit_error", "queue_full", 1),
    OtherBank: (503, "server_error", "other_bank", None),
    NeedsRebuild: (503, "server_error", "needs_rebuild", None),
    StoreError: (503, "server_error", "store_unavailable", 5),  # itself: a damaged state stays damaged
    ModelRemoved: (409, "invalid_request_error", "model_removed", None),
    EngineGone: (503, "server_error", "engine_gone", 5),
    AnswerLost: (500, "server_error", "answer_lost", None),
    Refused: (400, "invalid_request_error", None, None),
}


def public_message(error: MtaError, hint: bool = True) -> str:
    """Return what callers may read of an error; the hint only if it is written for callers."""
    if isinstance(error, _FOR_CALLERS):
        return f"{error.message}. {error.hint}" if hint else error.message
    match error:
        case PersonNotFound():
            return "the person no longer exists"
        case PersonForgotten():
            return "the person was forgotten during this request: nothing was saved. Send the request again if wanted"
        case OtherBank():
            return "the person's state was made with another bank. Personalize the person again, or send fallback: task"
        case StoreConflict():
            return "a newer state of the person was saved meanwhile"
        case StateCorrupt():
            return "the stored state could not be read or saved"
        case StoreError():
            return "the store of people's models does not answer. Send the request again in a few seconds"
        case InputError() | Diverged():
            return error.message
    return "the request failed in the server"


def error_of(error: MtaError) -> tuple[int, dict[str, object], dict[str, str]]:
    """Return status, body, and headers for an error."""
    if type(error) is StoreError:
        log.error("the store does not answer")  # its message may hold paths
    for kind, (status, name, code, retry) in _ANSWERS.items():
        if isinstance(error, kind) and (kind is not StoreError or type(error) is StoreError):
            code = error.code if isinstance(error, Refused) else code
            param, headers = "model" if status == 404 else None, {"Retry-After": str(retry)} if retry else {}
            return status, error_body(public_message(error), name, code, param), headers
    log.error("a request failed: %s", type(error).__name__)  # the message may hold paths
    return 500, error_body("the request failed in the server", "server_error", type(error).__name__), {}
