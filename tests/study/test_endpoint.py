"""The judge behind an OpenAI-compatible endpoint, against a local stub: nothing leaves this machine."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the study needs fastpref[train]")
pytest.importorskip("accelerate", reason="the study needs fastpref[train]")
pytest.importorskip("openai", reason="a judge endpoint needs fastpref[judge]")

from fastpref.benchmarks.study.endpoint import (
    KEY,
    Endpoint,
    Item,
    JudgeError,
    Verdict,
    check_ready,
    judge_pairs,
    read_choice,
    summarise,
)
from fastpref.benchmarks.study.judging import judge_results
from fastpref.console import Console

SECRET = "sk-test-0123456789-secret"
ITEMS = [Item(f"Question: {word}?\nAnswer:", f" long answer {word} " * 3, f" {word}") for word in "abcdef"]

Reply = tuple[int, Any] | str | None  # a status with its body, a judge's reply, or silence


class Stub(ThreadingHTTPServer):
    """`behave` gets the number of the request, counted from 1, and the two answers as they were shown."""

    def __init__(self, behave: Callable[[int, str, str], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.lock, self.closing = behave, threading.Lock(), threading.Event()
        self.bodies: list[dict[str, Any]] = []
        self.under_way, self.most_at_once = 0, 0

    def endpoint(self, **changes: Any) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self.server_port}/v1", "judge-1", **{"timeout": 10.0, **changes})


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append({**body, "path": self.path, "key": self.headers["Authorization"]})
            number = len(self.server.bodies)
            self.server.under_way += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.under_way)
        shown_a, shown_b = body["messages"][1]["content"].split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
        reply = self.server.behave(number, shown_a, shown_b.split("\n\nWhich")[0])
        with self.server.lock:
            self.server.under_way -= 1
        if reply is None:
            self.server.closing.wait(20)
            return
        status, content = (200, completion(reply)) if isinstance(reply, str) else reply
        raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("retry-after-ms", "5")  # the client would wait a second or so
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def completion(text: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-1", "choices": [choice]}


def longer(number: int, shown_a: str, shown_b: str) -> str:
    return "A" if len(shown_a) > len(shown_b) else "B" if len(shown_b) > len(shown_a) else "TIE"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int, str, str], Reply]], Stub]]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(KEY, SECRET)
    # The stub speaks plain HTTP, and the certificates that every client loads take longer than the rest of a test.
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *args, **kwargs: None)
    servers: list[Stub] = []

    def start(behave: Callable[[int, str, str], Reply]) -> Stub:
        server = Stub(behave)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study" / "verdicts.jsonl"


# What is asked, and what becomes of the replies


def test_a_judge_of_quality_gives_wins_and_losses_whichever_answer_is_shown_first(stub: Any, path: Path) -> None:
    server, counted = stub(longer), []
    items = [*ITEMS[:3], Item("q", " short", " this is longer"), Item("q", " same", " as me")]
    items[4] = Item("q", " one", " two")
    verdicts = judge_pairs(server.endpoint(), items, path, counted.append)
    assert [verdict.outcome for verdict in verdicts] == ["win"] * 3 + ["loss", "tie"]
    assert verdicts[0] == ("A", "B")
    assert sum(counted) == len(server.bodies) == 10
    summary = summarise([verdicts[:3], verdicts[3:]])
    assert summary[:4] == (3, 1, 1, 0)
    assert summary.rate is not None
    assert summary.rate.estimate == (1 + 0.25) / 2  # the mean of the seeds


def test_a_judge_that_always_prefers_the_first_place_prefers_nothing(stub: Any, path: Path) -> None:
    verdicts = judge_pairs(stub(lambda number, a, b: "A").endpoint(), ITEMS, path)
    summary = summarise([verdicts])
    assert summary[:4] == (0, 0, 6, 0)
    assert summary.rate == (0.5, 0.5, 0.5)


def test_what_is_unreadable_in_one_order_does_not_count_in_the_other() -> None:
    win, loss, tie = Verdict("A", "B"), Verdict("B", "A"), Verdict("TIE", "TIE")
    halves = [Verdict("A", "unreadable"), Verdict("unreadable", "TIE")]
    assert [verdict.outcome for verdict in halves] == ["unreadable"] * 2
    assert {Verdict(*both).outcome for both in [("A", "TIE"), ("TIE", "A"), ("B", "B"), ("A", "A")]} == {"tie"}
    summary = summarise([[win, *halves], [loss, tie], halves])
    assert summary[:4] == (1, 1, 1, 4)
    assert summary.rate is not None
    assert summary.rate.estimate == (1 + 0.25) / 2  # the third seed has nothing to say


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("A", "A"),
        (" B\n", "B"),
        ("TIE\nBoth are good.", "TIE"),
        ("A.", "unreadable"),
        ("a", "unreadable"),
        ("**A**", "unreadable"),
        ("unreadable", "unreadable"),
        (None, "unreadable"),
    ],
)
def test_a_reply_is_read_strictly(reply: str | None, choice: str) -> None:
    assert read_choice(reply) == choice


def test_a_reply_without_text_is_unreadable(stub: Any, path: Path) -> None:
    server = stub(lambda number, a, b: (200, completion(None)))
    assert judge_pairs(server.endpoint(), ITEMS[:1], path) == [("unreadable", "unreadable")]


def test_the_request_has_the_model_both_answers_the_key_and_no_freedom(stub: Any, path: Path) -> None:
    server = stub(longer)
    judge_pairs(server.endpoint(), ITEMS[:1], path)
    body = server.bodies[0]
    assert (body["path"], body["key"]) == ("/v1/chat/completions", f"Bearer {SECRET}")
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert body["max_tokens"] <= 16
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "long answer a" in body["messages"][1]["content"]


# What is kept


def test_nothing_is_asked_twice_and_without_questions_neither_key_nor_package_is_needed(
    stub: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, counted = stub(longer), []
    first = judge_pairs(server.endpoint(), ITEMS, path)
    assert len(server.bodies) == 12
    monkeypatch.delenv(KEY)
    monkeypatch.setitem(sys.modules, "openai", None)
    assert judge_pairs(server.endpoint(), ITEMS, path, counted.append) == first
    assert judge_pairs(server.endpoint(), [ITEMS[2]._replace(first=ITEMS[2].second, second=ITEMS[2].first)], path) == [
        Verdict("B", "A")
    ]  # the other way round it is the same two questions
    assert len(server.bodies) == 12
    assert sum(counted) == 12


def test_an_interrupted_run_goes_on_where_it_was_and_keeps_what_was_under_way(stub: Any, path: Path) -> None:
    def slow(number: int, a: str, b: str) -> str:
        time.sleep(0.05)
        return longer(number, a, b)

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    server = stub(slow)
    with pytest.raises(KeyboardInterrupt):
        judge_pairs(server.endpoint(concurrency=2), ITEMS, path, interrupt)
    before = len(server.bodies)
    assert 2 <= before < 12
    assert len(path.read_text().splitlines()) == before
    assert [verdict.outcome for verdict in judge_pairs(server.endpoint(), ITEMS, path)] == ["win"] * 6
    assert len(server.bodies) == 12


def test_a_torn_last_line_is_asked_again_and_the_file_is_whole_after_it(stub: Any, path: Path) -> None:
    server = stub(longer)
    judge_pairs(server.endpoint(), ITEMS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    judge_pairs(server.endpoint(), ITEMS, path)
    assert len(server.bodies) == 13
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "x"}', '{"key": "x", "choice": "C"}', "\ufffd"])
def test_a_file_of_something_else_is_refused_by_its_line_and_left_alone(stub: Any, path: Path, line: str) -> None:
    path.parent.mkdir()
    path.write_text(f'{{"key": "k", "choice": "A"}}\n{line}\n', encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"line 2 of .*verdicts\.jsonl is no verdict of a judge"):
        judge_pairs(stub(longer).endpoint(), ITEMS, path)
    assert path.read_bytes() == before


# What goes wrong


def test_a_server_that_fails_twice_is_asked_again(stub: Any, path: Path) -> None:
    server = stub(lambda number, a, b: (500, {"error": {"message": "busy"}}) if number <= 2 else longer(number, a, b))
    assert judge_pairs(server.endpoint(concurrency=1), ITEMS[:1], path) == [("A", "B")]
    assert len(server.bodies) == 4


def test_a_server_that_goes_on_failing_is_an_error_and_what_it_said_before_is_kept(stub: Any, path: Path) -> None:
    server = stub(lambda number, a, b: longer(number, a, b) if number <= 5 else (500, "<html>down\n</html>"))
    with pytest.raises(JudgeError, match=r"fails .HTTP 500: .*next run goes on") as caught:
        judge_pairs(server.endpoint(concurrency=1, retries=1), ITEMS, path)
    assert "\n" not in str(caught.value)
    assert len(server.bodies) == 7  # five replies, one failure and its retry: the rest are not sent
    server.behave = longer
    assert len(judge_pairs(server.endpoint(), ITEMS, path)) == 6
    assert len(server.bodies) == 7 + 7


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_one_line_that_does_not_hold_it(
    stub: Any, path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    def refuse(number: int, a: str, b: str) -> Reply:
        return f"not {SECRET}" if number == 1 else (status, {"error": {"message": f"Incorrect key:\n{SECRET}"}})

    with pytest.raises(JudgeError) as caught:
        judge_pairs(stub(refuse).endpoint(concurrency=1), ITEMS, path)
    message = str(caught.value)
    assert f"refuses the key in OPENAI_API_KEY (HTTP {status}: Incorrect key: [key])" in message
    assert "\n" not in message
    assert "not [key]" in path.read_text()
    told = "".join(traceback.format_exception(caught.value)) + "".join(capsys.readouterr())
    assert SECRET not in told + path.read_text() + repr(caught.value)


@pytest.mark.parametrize("body", ["no JSON", [], {"choices": []}, {"choices": None}])
def test_a_reply_that_is_no_chat_completion_is_an_error(stub: Any, path: Path, body: Any) -> None:
    with pytest.raises(JudgeError, match="fails: its reply is no chat completion"):
        judge_pairs(stub(lambda number, a, b: (200, body)).endpoint(retries=0), ITEMS, path)


@pytest.mark.parametrize("key", [None, "", "  "])
def test_a_missing_key_is_known_before_any_request(
    stub: Any, path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    server = stub(longer)
    if key is None:
        monkeypatch.delenv(KEY)
    else:
        monkeypatch.setenv(KEY, key)
    for attempt in (check_ready, lambda: judge_pairs(server.endpoint(), ITEMS, path)):
        with pytest.raises(JudgeError, match="no key in the environment variable OPENAI_API_KEY"):
            attempt()
    assert server.bodies == []
    assert not path.exists()


@pytest.mark.parametrize(
    "url", [f"https://me:{SECRET}@host/v1", f"https://host/v1?key={SECRET}", f"http://h/#{SECRET}"]
)
def test_a_url_that_may_hold_a_key_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ValueError, match="without user name, password, query and fragment") as caught:
        Endpoint(url, "m")
    assert SECRET not in str(caught.value)


def test_a_study_s_answers_are_judged_pair_by_pair_and_nothing_is_asked_twice(stub: Any, tmp_path: Path) -> None:
    """The methods that the findings compare, where the results have them; questions without the prompt's frame."""
    prompts = {str(seed): [f"Question: Q{seed}{place}?\nAnswer:" for place in range(2)] for seed in (0, 1)}
    length = {"dpo": 1, "dpop": 3, "sft": 4, "trl_matched": 2}
    results = {
        "sets": ["standard"],
        "seeds": [0, 1],
        "methods": list(length),
        "prompts": prompts,
        "cells": [
            {
                "set": "standard",
                "seed": seed,
                "method": method,
                "answers": [f" {seed}{place}" * words for place in "ab"],
            }
            for seed in (0, 1)
            for method, words in length.items()
        ],
    }
    server = stub(longer)
    out = io.StringIO()
    found = judge_results(results, server.endpoint(), tmp_path, Console(main=True, progress=False, out=out))
    assert [(row["first"], row["second"], row["wins"], row["losses"], row["ties"]) for row in found["pairs"]] == [
        ("dpo", "trl_matched", 0, 4, 0),
        ("dpop", "trl_matched", 4, 0, 0),
        ("sft", "dpop", 4, 0, 0),
    ]
    assert found["pairs"][1]["rate"] == [1.0, 1.0, 1.0]
    assert (found["model"], found["base_url_host"]) == ("judge-1", f"127.0.0.1:{server.server_port}")
    assert json.loads(json.dumps(found)) == found
    asked = [body["messages"][1]["content"] for body in server.bodies]
    assert all("[Question]\nQ" in text and "Answer:" not in text.split("[Answer A]")[0] for text in asked)
    assert "judge-1 on dpop against trl_matched, standard: 4 wins, 0 losses, 0 ties, 0 unreadable" in out.getvalue()
    before = len(server.bodies)
    assert judge_results(results, server.endpoint(), tmp_path, Console(main=True, progress=False, out=out)) == found
    assert len(server.bodies) == before == 3 * 4 * 2
