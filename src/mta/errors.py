"""Everything mta raises for a user's mistake or a broken file.

MtaError
├── InputError            what the user gave does not fit
│   ├── DataError         a file of people's items: names file, line and field
│   ├── TaskError         a task that is unknown or wrongly written
│   ├── ConfigError       a configuration key or value
│   ├── PersonNotFound    no state, history or anchor under that id
│   │   └── NobodyHere    somebody unknown to the server, or whom that key may not know
│   ├── AnchorNotFound    an anchor number outside the bank
│   └── Refused           what a caller of the server asks for
├── ModelError
│   ├── UnsupportedModel  a base this method cannot adapt
│   ├── MemoryBudgetError  one person alone needs more than the memory budget
│   └── Diverged          training led to numbers that are not finite
├── AssetError            an asset that cannot be fetched or is not what was pinned
├── HubError              the hub refuses, or cannot be reached
├── ClusterError          Ray, or workers that cannot begin
├── BankError
│   ├── BankMismatch      a bank built for another base
│   └── BankCorrupt       files missing, cut short or changed
├── StoreError
│   ├── StateCorrupt      a person's file that fails its checks
│   ├── OtherBank         a person's state that was made with another bank
│   ├── PersonForgotten   a person who was forgotten while something was made of their items
│   └── StoreConflict     somebody else wrote that version first
├── QueueFull             the server has as much to do as it takes
├── AnswerLost            one answer that could not be computed
├── EngineGone            the server's engine has stopped
├── NeedsRebuild          a bank that is not served (``--strict``)
└── VllmNotStarted        a vLLM server that does not come up

A message says what happened, what was found and what was expected; ``hint`` says what to type next. Those of the
server are defined in ``mta.serving``.
To add one: subclass the nearest branch, draw it above, and provoke it in tests/test_errors.py.
"""

from __future__ import annotations


class MtaError(Exception):
    """Root of all errors that are not bugs; the command line prints it and exits with 1."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)  # both in args: errors cross process borders pickled
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}"


class InputError(MtaError, ValueError):
    """What the user gave does not fit."""


class DataError(InputError):
    """A file of people's items is wrong somewhere; the message names file, line and field."""


class TaskError(InputError):
    """A task is unknown or wrongly written."""


class ConfigError(InputError):
    """A configuration key or value is unknown or out of range."""


class PersonNotFound(InputError):
    """No state, history or anchor is known under that id."""


class AnchorNotFound(InputError):
    """An anchor number lies outside the bank."""


class ModelError(MtaError):
    """The base model cannot do what was asked."""


class UnsupportedModel(ModelError):
    """A base this method cannot adapt."""


class MemoryBudgetError(ModelError):
    """One person alone needs more memory than the budget allows."""


class Diverged(ModelError):
    """What was trained for somebody led to numbers that are not finite."""


class AssetError(MtaError):
    """An asset cannot be fetched or is not what was pinned."""


class HubError(MtaError):
    """The hub refuses what was asked, knows no such repository, or cannot be reached."""


class ClusterError(MtaError):
    """A cluster cannot be reached, or its workers cannot work."""


class BankError(MtaError):
    """A bank cannot be used."""


class BankMismatch(BankError):
    """A bank was built for another base."""


class BankCorrupt(BankError):
    """Files of a bank are missing, cut short or changed."""


class StoreError(MtaError):
    """The store of people's states cannot be used."""


class StateCorrupt(StoreError):
    """A person's file fails its checks."""


class OtherBank(StoreError):
    """A person's state was made with another bank."""


class PersonForgotten(StoreError):
    """A person was forgotten while something was made of their items: it is not saved."""


class StoreConflict(StoreError):
    """Another writer created that version first."""
