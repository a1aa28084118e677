"""Sends requests at changing rates, however long the server takes, and counts what returns."""

import asyncio
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.soak.traffic import Ask, Traffic, dumps

PERIOD_SECONDS = 120
"""The rate swings once in so many seconds, between a quarter and seven quarters of the mean."""

MOST_IN_FLIGHT = 64
"""A request that would be one more waits; such requests are counted."""

ANSWER_SECONDS = 600


@dataclass(frozen=True)
class Answer:
    """One choice of a response: token ids, and the log-probability of each."""

    ask: Ask
    tokens: list[int]
    logprobs: list[float]
    text: str


@dataclass
class Counts:
    """What happened so far.

    Attributes:
        kinds: Requests by kind.
        refused: HTTP 400, as expected, by what the error names.
        faults: What should never be, in words; the first few.
        fault_count: How many.
        held_back: Requests that waited for others to end.
        latencies: Seconds since the start, and seconds that an answer of a staying client took.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0
    answered: int = 0
    server_errors: int = 0
    held_back: int = 0
    latencies: list[tuple[float, float]] = field(default_factory=list)

    def fault(self, text: str) -> None:
        self.fault_count += 1
        if len(self.faults) < 20:
            self.faults.append(text)
            print(text, file=sys.stderr, flush=True)


class Client:
    """Open-loop load on one server.

    Args:
        url: The server's, on this machine.
        traffic: Makes the requests.
        rate: Mean requests a second.
        seconds: How long new requests start.
        most: At most so many requests.
        on_answer: Called with each answer of a client that stays.
        seed: Of the arrival times.
    """

    def __init__(
        self,
        url: str,
        traffic: Traffic,
        rate: float,
        seconds: float,
        most: int,
        on_answer: Callable[[Answer], None],
        seed: int,
    ) -> None:
        self._url, self._traffic, self._rate = url, traffic, rate
        self._seconds, self._most, self._on_answer = seconds, most, on_answer
        self._rng = random.Random(seed)
        self.counts = Counts()

    async def run(self) -> None:
        """Returns once the last answer is there."""
        self._start = time.monotonic()
        places = asyncio.Semaphore(MOST_IN_FLIGHT)
        tasks: set[asyncio.Task[None]] = set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=ANSWER_SECONDS, limits=limits) as self._http:
            for _ in range(self._most):
                since = time.monotonic() - self._start
                if since >= self._seconds:
                    break
                swing = 1 + 0.75 * math.sin(2 * math.pi * since / PERIOD_SECONDS)
                await asyncio.sleep(self._rng.expovariate(self._rate * swing))
                self.counts.held_back += places.locked()
                await places.acquire()
                task = asyncio.create_task(self._send(self._traffic.next(), places))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)

    async def _send(self, ask: Ask, places: asyncio.Semaphore) -> None:
        counts = self.counts
        counts.kinds[ask.kind] += 1
        begin = time.monotonic()
        try:
            if ask.body.get("stream"):
                answers = await self._stream(ask)
            else:
                answers = await self._whole(ask)
            if answers is not None:
                counts.answered += 1
                counts.latencies.append((begin - self._start, time.monotonic() - begin))
                for answer in answers:
                    self._on_answer(answer)
        except (httpx.HTTPError, KeyError, ValueError) as e:
            counts.fault(f"{ask.kind}: {type(e).__name__}: {e}")
        finally:
            places.release()

    async def _whole(self, ask: Ask) -> list[Answer] | None:
        reply = await self._http.post(self._url + ask.path, content=dumps(ask.body), headers=JSON)
        if not self._is_as_expected(ask, reply.status_code, reply.text):
            return None
        return [_answer(ask, [choice]) for choice in reply.json()["choices"]]

    async def _stream(self, ask: Ask) -> list[Answer] | None:
        chunks = []
        async with self._http.stream(
            "POST", self._url + ask.path, content=dumps(ask.body), headers=JSON
        ) as reply:
            if reply.status_code != 200:
                self._is_as_expected(ask, reply.status_code, (await reply.aread()).decode())
                return None
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                data = json.loads(line[6:])
                if "error" in data:
                    self.counts.fault(f"{ask.kind}: an error in the stream: {data['error']}")
                    return None
                chunks += data["choices"]
                if ask.leaves_after is not None and len(chunks) >= ask.leaves_after:
                    return None
        return [_answer(ask, chunks)]

    def _is_as_expected(self, ask: Ask, status: int, text: str) -> bool:
        """Counts what was refused, and what should not have been; True for an answer to read."""
        self.counts.server_errors += status >= 500
        if status != ask.expected:
            self.counts.fault(f"{ask.kind}: HTTP {status}, expected {ask.expected}: {text[:300]}")
        elif status == 400:
            self.counts.refused[json.loads(text)["error"].get("param") or "no field"] += 1
        return status == ask.expected == 200


JSON = {"content-type": "application/json"}


def _answer(ask: Ask, choices: list[dict[str, Any]]) -> Answer:
    """One choice, whole or in the chunks of a stream."""
    tokens: list[int] = []
    logprobs: list[float] = []
    text = ""
    for choice in choices:
        tokens += choice.get("token_ids") or []
        found = choice.get("logprobs") or {}
        if "token_logprobs" in found:
            logprobs += found["token_logprobs"]
        else:
            logprobs += [entry["logprob"] for entry in found.get("content") or []]
        message = choice.get("message") or choice.get("delta") or choice
        text += message.get("text") or message.get("content") or ""
    return Answer(ask, tokens, logprobs, text)
