"""Errors that mta raises for a user's mistake, a broken file, or a failed service.

MtaError
├── InputError            invalid input
│   ├── DataError         a wrong file of people's items: names file, line and field
│   ├── TaskError         an unknown or invalid task
│   ├── ConfigError       an unknown configuration key or an invalid value
│   ├── PersonNotFound    no state for the id, or no such person in a file
│   │   └── UnknownOrForbidden  the server does not know the person, or the key has no access
│   ├── AnchorNotFound    a merge of more anchors than the bank has
│   └── Refused           an invalid request to the server
├── ModelError
│   ├── UnsupportedModel  a model that mta cannot adapt, or must not load
│   ├── MemoryBudgetError  one person needs more than the memory budget
│   └── Diverged          training produced non-finite numbers
├── MissingExtra          an optional package is not installed
├── AssetError            an asset that cannot be fetched, or has a wrong checksum
├── HubError              the hub refuses a request, or cannot be reached
├── ClusterError          a Ray cluster cannot be reached, or its workers cannot start
├── BankError
│   ├── BankNotFound      a folder without a bank
│   ├── BankMismatch      a bank built for another base
│   ├── BankRefused       a folder that holds a bank of other people or settings
│   └── BankCorrupt       files of a bank are missing, truncated or changed
├── StoreError
│   ├── StateCorrupt      a person's file that fails its checks
│   ├── OtherBank         a person's state made with another bank
│   ├── PersonForgotten   a person was forgotten while their items were in use
│   └── StoreConflict     another writer created the version first
├── QueueFull             the server's queue is full
├── AnswerLost            one answer could not be computed
├── ModelRemoved          the model was forgotten or removed while it answered
├── EngineGone            the server's engine has stopped
├── NeedsRebuild          a bank that ``--strict`` does not serve
└── VllmNotStarted        a vLLM server that does not start

A message says what happened, what was found and what was expected; ``hint`` says what to type next. The errors of
the server are defined in ``mta.serving.engine``, ``mta.serving.api.errors``, and ``mta.serving.vllm.server``.
To add one: subclass the nearest branch, and draw it above.
"""

from __future__ import annotations


class MtaError(Exception):
    """Root of all errors that are not bugs. The command line prints the error and exits with 1."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)  # both in args, so that the error can be pickled between processes
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}"


class InputError(MtaError, ValueError):
    """The input is invalid."""


class DataError(InputError):
    """A file of people's items is wrong. The message names file, line and field."""


class TaskError(InputError):
    """A task is unknown or invalid."""


class ConfigError(InputError):
    """A configuration key or value is unknown or out of range."""


class PersonNotFound(InputError):
    """No state exists for the id, or no such person is in the file."""


class AnchorNotFound(InputError):
    """A merge needs more anchors than the bank has."""


class ModelError(MtaError):
    """The base model cannot be used as requested."""


class UnsupportedModel(ModelError):
    """The model cannot be adapted by mta, or loading it would be unsafe."""


class MemoryBudgetError(ModelError):
    """One person needs more memory than the budget allows."""


class Diverged(ModelError):
    """Training for a person produced non-finite numbers."""


class MissingExtra(MtaError):
    """An optional package is not installed. The message names the extra that installs it."""


class AssetError(MtaError):
    """An asset cannot be fetched, or its checksum differs from the pinned one."""


class HubError(MtaError):
    """The hub refuses the request, has no such repository, or cannot be reached."""


class ClusterError(MtaError):
    """A cluster cannot be reached, or its workers fail."""


class BankError(MtaError):
    """A bank cannot be used."""


class BankNotFound(BankError):
    """A folder holds no bank."""


class BankMismatch(BankError):
    """A bank was built for another base."""


class BankRefused(BankError):
    """A folder holds a bank, perhaps an unfinished one, of other people or settings."""


class BankCorrupt(BankError):
    """Files of a bank are missing, truncated or changed."""


class StoreError(MtaError):
    """The store of people's states cannot be used."""


class StateCorrupt(StoreError):
    """A person's file fails its checks."""


class OtherBank(StoreError):
    """A person's state was made with another bank."""


class PersonForgotten(StoreError):
    """A person was forgotten while their items were in use. The result is not saved."""


class StoreConflict(StoreError):
    """Another writer created the version first."""
