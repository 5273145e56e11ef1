"""``mta doctor --served``: check that a server answers with the models that mta trained.

The server answers a question greedily and returns the log probability of each token. The same tokens are then scored
here, with the code that trained the models, so that another adapter, scale, or chat template shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mta.data.tasks.prompt import Example
from mta.data.tasks.task import Task
from mta.errors import InputError, MtaError
from mta.personalize import Personalizer
from mta.personalize.adapters import TASK, PersonOrModel, SharedModel, row_adapters
from mta.serving.engine import person_name
from mta.store.state import State
from mta.tools.doctor import Finding
from mta.training.scoring import log_likelihood

if TYPE_CHECKING:
    import httpx2 as httpx

LIMIT = 0.1  # nats per token; rounding in bfloat16 stays below half of it (docs/how-to/serve.md)
PERSON = "person:{}"  # how mta serve names a person's model
_TOKENS = 16  # of each answer
_QUESTIONS = 3
_PATIENCE = 120.0  # seconds for one answer


@dataclass(frozen=True, slots=True)
class Server:
    """A server with OpenAI's API, and how it names models. ``person`` is a template with ``{}`` for the id."""

    url: str
    key: str = ""
    person: str = PERSON
    task: str = "task"

    def client(self) -> httpx.Client:
        """Return a client of the server. Raises InputError."""
        import httpx2 as httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            url = self.url.rstrip("/").removesuffix("/v1")
            return httpx.Client(base_url=url, headers=headers, timeout=_PATIENCE, trust_env=False)  # without a proxy
        except (httpx.InvalidURL, UnicodeError) as error:
            raise InputError(
                f"the address {self.url!r} or the key cannot be used: {error}",
                hint="For example:  --served http://127.0.0.1:8000 --key-file app.key",
            ) from None

    def name_of(self, who: PersonOrModel) -> str:
        """Return the model name of a person or of the pooled model."""
        if isinstance(who, SharedModel):
            return self.task
        return person_name(who) if self.person == PERSON else self.person.replace("{}", who)


def check_served(server: Server, personal: Personalizer, people: Sequence[str]) -> list[Finding]:
    """Compare the server's log probabilities with ours, for the pooled model and the people.

    Without people, the last finding is a warning: a store has no ids, only their hashes, so it cannot list people.
    Raises PersonNotFound for a person without a state here, InputError if nothing would be compared.
    """
    import httpx2 as httpx

    asked: list[PersonOrModel] = [*([TASK] if server.task else []), *people]
    if not asked:
        raise InputError("there is no model to compare", hint="Name a person:  --person ann")
    states = {person: personal.state(person) for person in people}
    questions = _questions(personal.bank.task)
    findings = []
    with server.client() as client:
        for who in asked:
            name = server.name_of(who)
            try:
                answers = [_answer(client, name, question) for question in questions]
                owner = who if isinstance(who, SharedModel) else states[who]
                findings.append(_compared(personal, owner, name, questions, answers))
            except httpx.HTTPError as error:
                hint = f"Start it, or correct the address:  --served {server.url}"
                findings.append(Finding("served", name, "problem", f"{server.url} does not answer: {error}", hint))
                break
            except MtaError as error:
                findings.append(Finding("served", name, "problem", error.message, error.hint))
    if not people:
        hint = "Name some people; the store has only hashes of their ids:  --person ann --person bob"
        findings.append(Finding("served", "people", "warning", "no person's model was compared", hint))
    return findings


def _questions(task: Task) -> list[str]:
    """Return prompts of the task: its examples, or one with the names of its fields as texts."""
    form = task.query or task.item
    fields = list(task.examples[:_QUESTIONS]) or [{name: name for name in form.inputs}]
    return [task.prompt(task.asked(one)) for one in fields]


def _answer(client: httpx.Client, model: str, question: str) -> list[tuple[int, float]]:
    """Return the tokens of a greedy answer with their log probabilities. Raises InputError, httpx.HTTPError."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}], "logprobs": True}
    body |= {"max_tokens": _TOKENS, "temperature": 0, "return_tokens_as_token_ids": True}
    answer = client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        raise InputError(
            f"the server answered {answer.status_code}: {answer.text[:300]}",
            hint="Name models as the server does (--served-as), and give a key that may ask them (--key-file).",
        )
    try:
        tokens = (answer.json()["choices"][0]["logprobs"] or {}).get("content") or []
        return [(int(token["token"].removeprefix("token_id:")), float(token["logprob"])) for token in tokens]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(
            "the server's answer has not the format of /v1/chat/completions with logprobs and ids of tokens",
            hint="Give the address of mta serve or of a vLLM server, without /v1.",
        ) from None


def _compared(
    personal: Personalizer,
    owner: State | SharedModel,
    name: str,
    questions: Sequence[str],
    answers: Sequence[Sequence[tuple[int, float]]],
) -> Finding:
    """Return the finding of one model: the mean difference per token, for a person also from the pooled model's."""
    prompts, base = personal.base.prompts, personal.base
    pairs = [(prompts.chat([{"role": "user", "content": text}]), own) for text, own in zip(questions, answers) if own]
    # Our server leaves an end token out, vLLM returns it: it is a token like others.
    examples = [Example((*prompt, *(id for id, _ in own)), len(prompt)) for prompt, own in pairs]
    if not examples:
        hint = "Ask other questions: give the task examples (docs/how-to/add-a-task.md)."
        return Finding("served", name, "warning", "all answers are empty", hint)
    hint = "Check that the server has the same base, bank, store, and chat template."
    if max(id for example in examples for id in example.target) >= base.model.config.get_text_config().vocab_size:
        return Finding("served", name, "problem", "the server chose a token that the base does not have", hint)
    served = [sum(logprob for _, logprob in own) for _, own in pairs]
    count = sum(len(own) for _, own in pairs)

    def apart(from_: State | SharedModel) -> float:
        ours = log_likelihood(base, [examples], row_adapters(base, personal.bank, [from_]), owners=[0])[0].tolist()
        return sum(abs(theirs - own) for theirs, own in zip(served, ours)) / count

    difference = apart(owner)
    said = f"{len(examples)} answers, {count} tokens: log probabilities differ by {difference:.4f} per token"
    pooled = apart(TASK) if isinstance(owner, State) else difference
    if isinstance(owner, State):
        said += f" ({pooled:.4f} from the pooled model's)"
    wrong = not (difference <= LIMIT and pooled >= difference / 2)  # NaN is wrong, too
    return Finding("served", name, "problem" if wrong else "ok", said, hint if wrong else "")
