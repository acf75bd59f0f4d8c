"""Which of two answers a judge behind an OpenAI-compatible chat-completions endpoint prefers. Off unless asked for.

Every pair is asked about in both orders, and an answer wins only where it is preferred in both, as Zheng et al. 2023
("Judging LLM-as-a-Judge", arXiv:2306.05685, section 3.4) do it: a preference for the first place makes ties, not wins.
What the judge says is kept in a JSONL file as soon as it is there, so that a run that was interrupted pays for nothing
twice. The key is read from the environment variable OPENAI_API_KEY where the client is made, and goes nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

from fastpref.benchmarks.study.measures import Interval, bootstrap
from fastpref.checks import check_number
from fastpref.training.checkpoints.durable import writing

KEY = "OPENAI_API_KEY"
MAX_TOKENS = 8  # one letter or TIE; some tokenizers put marks around it
SHOWN = 200  # characters of a server's own words in an error message
_TEXTS = json.loads(files(__package__).joinpath("texts", "judge.json").read_text(encoding="utf-8"))
INSTRUCTIONS, QUESTION = _TEXTS["instructions"], _TEXTS["question"]

Choice = Literal["A", "B", "TIE", "unreadable"]
Outcome = Literal["win", "loss", "tie", "unreadable"]
CHOICES: tuple[Choice, ...] = get_args(Choice)


class JudgeError(RuntimeError):
    """The endpoint cannot judge; the message is one line that says why and what to do. What it said before is kept."""


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is, and how it is asked. Holds no key."""

    base_url: str  # up to and with the version: http://localhost:8000/v1
    model: str
    timeout: float = 60.0  # seconds for one reply
    retries: int = 5  # of a request that failed for a reason that may pass; the client waits longer every time
    concurrency: int = 4  # requests at a time

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"judge_url must be like https://host/v1, got {self.base_url!r}")
        if parts.username or parts.password or parts.query or parts.fragment:  # where keys hide: not shown here
            raise ValueError(
                f"judge_url must be without user name, password, query and fragment: the key belongs in {KEY}"
            )
        if not self.model.strip():
            raise ValueError("judge_model must be the name of a model, got an empty one")
        check_number("timeout", self.timeout, minimum=0, open_minimum=True)
        check_number("retries", self.retries, minimum=0)
        check_number("concurrency", self.concurrency, minimum=1)

    @property
    def host(self) -> str:
        return urlsplit(self.base_url).netloc


class Item(NamedTuple):
    """A question and the two answers to compare."""

    question: str
    first: str
    second: str


class Verdict(NamedTuple):
    """What the judge chose with the first answer shown as A, and with the second shown as A."""

    forward: Choice
    backward: Choice

    @property
    def outcome(self) -> Outcome:
        """For the first answer. Unless both replies can be read, the pair is unreadable: one order alone is biased."""
        if "unreadable" in self:
            return "unreadable"
        if self == ("A", "B"):
            return "win"
        return "loss" if self == ("B", "A") else "tie"


class Summary(NamedTuple):
    wins: int
    losses: int
    ties: int
    unreadable: int
    rate: Interval | None  # of what could be read, a tie being one half; None where nothing could


class _Request(NamedTuple):
    """One pair in one order."""

    question: str
    shown_a: str
    shown_b: str

    def key(self, model: str) -> str:
        """Another wording of the instructions is another question."""
        return hashlib.sha256(json.dumps([model, INSTRUCTIONS, QUESTION, *self]).encode()).hexdigest()


def check_ready() -> None:
    """Raises what `judge_pairs` would before its first request, so that a long run can know at its start.

    Raises:
        ImportError: openai is not installed.
        JudgeError: there is no key in the environment.
    """
    _openai()
    _key()


def judge_pairs(
    endpoint: Endpoint,
    items: Sequence[Item],
    path: Path,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Verdict]:
    """The judge's verdict on each item, in order; what is in the file `path` already is not asked again.

    `advance` is called from this thread, with numbers that sum to two an item. Where nothing is left to ask, neither
    the package openai nor a key is needed.

    Raises:
        JudgeError: the key, the model or the server fails. Requests under way are let end, and kept.
        SaveError: `path` cannot be written.
        ImportError: openai is not installed.
        ValueError: `path` holds lines that no run of this wrote.
    """
    requests = [_both_orders(item) for item in items]
    keys = [tuple(request.key(endpoint.model) for request in both) for both in requests]
    known = _read(path)
    wanted = Counter(key for both in keys for key in both)
    if kept := sum(count for key, count in wanted.items() if key in known):
        advance(kept)
    left = {
        key: request
        for both, both_keys in zip(requests, keys, strict=True)
        for request, key in zip(both, both_keys, strict=True)
        if key not in known
    }
    if left:
        _ask_all(endpoint, left, path, known, lambda key: advance(wanted[key]))
    return [Verdict(*(known[key] for key in both)) for both in keys]


def summarise(verdicts: Sequence[Sequence[Verdict]]) -> Summary:  # by seed
    """Counts over all seeds; the interval is `fastpref.benchmarks.study.measures.bootstrap`'s, over seeds and pairs."""
    outcomes = Counter(verdict.outcome for group in verdicts for verdict in group)
    scores = {"win": 1.0, "loss": 0.0, "tie": 0.5}
    readable = [[scores[verdict.outcome] for verdict in group if verdict.outcome in scores] for group in verdicts]
    groups = [group for group in readable if group]
    return Summary(
        wins=outcomes["win"],
        losses=outcomes["loss"],
        ties=outcomes["tie"],
        unreadable=outcomes["unreadable"],
        rate=bootstrap(groups) if groups else None,
    )


def read_choice(reply: str | None) -> Choice:
    """The reply's first line, if it is A, B or TIE and nothing else. Nothing is guessed."""
    first = (reply or "").strip().split("\n", 1)[0].strip()
    return next((choice for choice in CHOICES if choice == first and choice != "unreadable"), "unreadable")


def _both_orders(item: Item) -> tuple[_Request, _Request]:
    question, first, second = (text.strip() for text in item)
    return _Request(question, first, second), _Request(question, second, first)


def _ask_all(
    endpoint: Endpoint,
    requests: dict[str, _Request],  # by key
    path: Path,
    known: dict[str, Choice],  # the replies are added here, and to the file
    done: Callable[[str], None],
) -> None:
    openai, secret = _openai(), _key()
    lock = threading.Lock()
    path.parent.mkdir(parents=True, exist_ok=True)
    client = openai.OpenAI(
        api_key=secret, base_url=endpoint.base_url, timeout=endpoint.timeout, max_retries=endpoint.retries
    )
    stopped = threading.Event()  # a future that is cancelled may have begun

    def ask(key: str, file: IO[bytes]) -> str | None:
        if stopped.is_set():
            return None
        try:
            reply = _ask(client, endpoint, requests[key])
            choice = read_choice(reply)
            line = {"key": key, "model": endpoint.model, "choice": choice}
            if choice == "unreadable":
                line["reply"] = _clean(reply, secret)
            with lock, writing(path):  # by the thread that has it: whatever stops the others, this one is paid for
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                known[key] = choice
        except BaseException:
            stopped.set()
            raise
        return key

    with client, path.open("ab") as file, ThreadPoolExecutor(endpoint.concurrency) as pool:
        futures = [pool.submit(ask, key, file) for key in requests]
        try:
            for future in as_completed(futures):
                if (key := future.result()) is not None:
                    done(key)
        except openai.OpenAIError as error:
            raise JudgeError(_explain(openai, error, endpoint, secret, path)) from None  # its cause may hold the key
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)  # waits for those under way, which are still written


def _ask(client: Any, endpoint: Endpoint, request: _Request) -> str | None:
    user = QUESTION.format(question=request.question, first=request.shown_a, second=request.shown_b)
    try:
        reply = client.chat.completions.create(
            model=endpoint.model,
            messages=[{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": user}],
            temperature=0,
            max_tokens=MAX_TOKENS,
        )
    except ValueError:  # no JSON
        reply = None
    try:
        content = reply.choices[0].message.content
    except (AttributeError, TypeError, IndexError):  # the client checks no more than that it is JSON
        raise _openai().OpenAIError("its reply is no chat completion") from None
    return content if isinstance(content, str) else None


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            'a judge endpoint needs openai, which is not installed: pip install "fastpref[judge]"'
        ) from error
    return openai


def _key() -> str:
    secret = os.environ.get(KEY, "").strip()
    if not secret:
        raise JudgeError(f"there is no key in the environment variable {KEY}; for a server that asks for none, set any")
    if not (secret.isascii() and secret.isprintable()):  # no HTTP header can hold it
        raise JudgeError(f"the key in the environment variable {KEY} has characters that no key has: copy it again")
    return secret


def _explain(openai: Any, error: Exception, endpoint: Endpoint, secret: str, path: Path) -> str:
    """One line without the key, whatever the server wrote."""
    code = getattr(error, "status_code", None)
    body = getattr(error, "body", None)
    said = body["message"] if isinstance(body, dict) and isinstance(body.get("message"), str) else str(error)
    if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
        why = f"refuses the key in {KEY} (HTTP {code}: {said})"
    elif isinstance(error, openai.NotFoundError):
        why = f"has no model {endpoint.model!r}, or nothing at {endpoint.base_url} (HTTP {code}: {said})"
    elif isinstance(error, openai.APITimeoutError):
        why = f"did not reply within {endpoint.timeout:g} s (attempts: {endpoint.retries + 1})"
    elif isinstance(error, openai.APIConnectionError):
        why = f"cannot be reached: {error.__cause__ or said}"
    else:
        why = f"fails: {said}" if code is None else f"fails (HTTP {code}: {said})"
    kept = f"What was judged is kept in {path}, and the next run goes on from there"
    return f"{_clean(f'the judge at {endpoint.host} {why}', secret)}. {kept}"


def _clean(text: str | None, secret: str) -> str:
    """On one line, short, and without the key."""
    line = " ".join((text or "").replace(secret, "[key]").split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def _read(path: Path) -> dict[str, Choice]:
    """What the file holds, by key. Its last line may be torn, by a kill or a full disk: it is cut off."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    known: dict[str, Choice] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            key, choice = record["key"], record["choice"]
        except (ValueError, KeyError, TypeError):
            key, choice = None, None
        if not isinstance(key, str) or choice not in CHOICES:
            raise ValueError(f"line {number} of {path} is no verdict of a judge: remove the line, or give another file")
        known[key] = choice
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return known
