"""The sweep against a server: as it serves, or at several numbers of visual tokens per request, where it is ours."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenreduce.bench.asking.pictures import Pictures
from tokenreduce.bench.asking.source import reason_of
from tokenreduce.bench.methods import UNREDUCED
from tokenreduce.bench.questions import Item
from tokenreduce.bench.remote.answers import Answer, AnswerFile
from tokenreduce.bench.remote.client import Client, RefusedError, UnreachableError, check_url
from tokenreduce.bench.remote.questions import Form, keep_text
from tokenreduce.bench.remote.row import row_of
from tokenreduce.bench.runs import Run, RunWriter, open_run, versions
from tokenreduce.bench.task import Axis
from tokenreduce.bench.watch import Point, Watch
from tokenreduce.common.words import counted

__all__ = ["AXIS", "IgnoredKeepError", "Remote"]

AXIS = Axis("prompt_share", "prompt tokens", "prompt tokens by the server's count, % of those with all visual tokens")
#: A point whose first answers are all refusals is given up after so many.
ENOUGH = 16
#: How a question about the generated world is put to models that do not know its words alone.
WORLD_PROMPT = "{question}? Answer with one word."


class IgnoredKeepError(RuntimeError):
    """The server took a request with ``tokenreduce_keep`` and did nothing about it."""


@dataclass
class Remote:
    """Questions about images, asked of a server.

    Args:
        server: address of its API, ``http://127.0.0.1:8000/v1``.
        model: its name there; the first that the server lists when None.
        keeps: visual tokens per request, counts or ratios, for a server of ``tokenreduce serve``; 1.0 is always
            measured too, as the unreduced model. () asks the server as it is, whatever it serves.
        data, split, limit, seed: see :func:`~tokenreduce.bench.questions.load_questions`.
        prompt: the text of a question, with ``{question}`` in it; by default the question, of the world with a
            request for one word.
        concurrency: requests under way at once.
        timeout, tries, pause: see :class:`~tokenreduce.bench.remote.client.Client`.
        max_new_tokens: longest answer.

    Raises ``ValueError`` for bad settings.
    """

    server: str
    model: str | None = None
    keeps: tuple[int | float, ...] = ()
    data: str = "world"
    split: str = "test"
    limit: int | None = 180
    seed: int = 0
    prompt: str | None = None
    concurrency: int = 32
    timeout: float = 120.0
    max_new_tokens: int = 16
    tries: int = 4
    pause: float = 0.5

    _session: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        self.server = check_url(self.server)
        for keep in self.keeps:
            whole = isinstance(keep, int) and not isinstance(keep, bool)
            if not (keep >= 1 if whole else isinstance(keep, float) and 0 < keep <= 1):
                raise ValueError(f"--keep lists counts of visual tokens (64) or ratios in (0,1] (0.25), not {keep!r}")
        if self.concurrency < 1 or not self.timeout > 0:
            raise ValueError("--concurrency is an int >= 1 and --timeout a number of seconds > 0")
        if self.prompt is None:
            self.prompt = WORLD_PROMPT if self.data == "world" else "{question}"
        Form("", self.prompt)
        self._session = secrets.token_hex(4)

    def settings(self) -> dict[str, Any]:
        """Everything that makes two rows comparable."""
        keys = (
            "server", "model", "data", "split", "limit", "seed", "prompt", "concurrency", "timeout", "max_new_tokens",
        )  # fmt: skip
        return {key: getattr(self, key) for key in keys}

    def points(self) -> list[tuple[Point, int | float | None]]:
        """What is measured, and ``keep`` of its requests."""
        if not self.keeps:
            return [(Point("served", "served", "served"), None)]
        less = [k for k in dict.fromkeys(self.keeps) if not (isinstance(k, float) and k == 1.0)]
        specs = [(f"served:{keep_text(k)}", k) for k in less]
        return [(Point(UNREDUCED, UNREDUCED, "", 1.0), 1.0), *[(Point(s, "served", s), k) for s, k in specs]]

    def sweep(self, out: str | Path, *, fresh: bool = False, command: str = "", watch: Watch | None = None,
              tick: Callable[[int, int], None] | None = None) -> Run:  # fmt: skip
        """Ask every point that ``out`` does not hold yet, and return the run with all rows.

        Answers are on the disk as they come: after Ctrl-C, or a server that dies (``OSError``), the next call asks
        the other questions only. A point that the server refuses is a row with its error, asked again by the next
        call. ``tick(done, total)`` follows the questions of a point.

        Raises ``ValueError`` and ``OSError`` as :func:`~tokenreduce.bench.runs.open_run` and
        :func:`~tokenreduce.bench.questions.load_questions` do, :class:`UnreachableError` where nobody listens,
        ``ImportError`` without httpx.
        """
        return asyncio.run(self._sweep(Path(out), fresh, command, watch or Watch(), tick or (lambda done, total: None)))

    # -- the sweep -----------------------------------------------------------------------------------------------------
    async def _sweep(self, out: Path, fresh: bool, command: str, watch: Watch, tick: Callable[[int, int], None]) -> Run:
        source = Pictures(self.data, self.split, self.limit, self.seed)
        async with Client(self.server, self.concurrency, self.timeout, self.tries, self.pause) as client:
            served = await self._choose_model(client)
            info = {
                "task": "vlm", "metric": "accuracy", "axis": asdict(AXIS), "settings": self.settings(),
                "versions": versions(), "hardware": {"server": self.server, "engine": served}, "command": command,
                "points": [], "problems": [],
            }  # fmt: skip
            with open_run(out, info, fresh=fresh) as writer:
                answers = AnswerFile(writer.run.folder)
                try:
                    await _Asking(self, client, source, writer, answers, watch, tick).all()
                finally:
                    answers.close()
                return writer.run

    async def _choose_model(self, client: Client) -> str:
        """Settle ``model``; what the server says of itself."""
        listed = {m["id"]: m for m in await client.models()}
        if self.model is None and not listed:
            raise ValueError(f"{self.server} lists no models; name one with --model, and end the address in /v1")
        if self.model is None:
            self.model = next(iter(listed))
        elif listed and self.model not in listed:
            raise ValueError(f"{self.server} serves no model {self.model!r}; it has: {', '.join(listed)}")
        return str(listed.get(self.model, {}).get("owned_by", "unknown"))


@dataclass
class _Asking:
    """One call of :meth:`Remote.sweep`."""

    task: Remote
    client: Client
    source: Pictures
    writer: RunWriter
    answers: AnswerFile
    watch: Watch
    tick: Callable[[int, int], None]

    async def all(self) -> None:
        """Every point without a row."""
        points, run = self.task.points(), self.writer.run
        ids = [point.id for point, _ in points]
        # Rows of other numbers of tokens stay: they are of the same questions and server.
        ids += [r["id"] for r in run.rows if r["id"] not in ids]
        self.writer.update(points=ids)
        done = {r["id"] for r in run.good}
        self.watch.plan(len(points), sum(p.id in done for p, _ in points))
        for point, keep in points:
            if point.id in done:
                continue
            self.watch.begin(point)
            began = time.perf_counter()
            row: dict[str, Any] = {"id": point.id, "method": point.method, "budget": point.budget, "spec": point.spec}
            try:
                row.update(await self._point(point, keep))
            except (RefusedError, IgnoredKeepError) as error:
                row["error"] = f"{type(error).__name__}: {error}"
                if isinstance(error, IgnoredKeepError):  # they are not of what the point says
                    self.answers.drop(point.id)
            row["wall_s"] = round(time.perf_counter() - began, 3)
            row = self.writer.append(row)
            problems = [self.source.problems[key] for key in sorted(self.source.problems)]
            if problems:
                self.writer.update(problems=problems)
            self.watch.end(point, row)
            if row.get("error") and point.id == UNREDUCED:
                return  # without it there is nothing to compare with

    async def _point(self, point: Point, keep: int | float | None) -> dict[str, Any]:
        there, refused = self.answers.of(point.id), []
        todo = [item for item in self.source.items if item.id not in there]
        known = self.answers.of(UNREDUCED) if self.task.keeps else None
        checked = _Check(keep, known)
        total = len(self.source.items)
        self.tick(total - len(todo), total)

        def take(answer: Answer) -> None:
            self.answers.add(answer)
            if answer.refused:
                refused.append(answer)
                if not there and len(refused) >= min(ENOUGH, total):
                    raise RefusedError(f"{answer.refused}{_hint(answer.refused, keep)}")
            else:
                there[answer.id] = answer
                checked.see(answer)
            self.tick(len(there) + len(refused), total)

        await self._ask(todo, point.id, keep, take)
        if not there:
            raise RefusedError(refused[0].refused + _hint(refused[0].refused, keep) if refused else self._none())
        checked.end()
        return row_of(there, self.source.items, refused, self.answers.of(UNREDUCED) if self.task.keeps else None)

    def _none(self) -> str:
        first = next(iter(self.source.problems.values()), {"path": "?", "reason": "?"})
        return f"no question of {self.task.data} can be asked; the first, {first['path']}: {first['reason']}"

    async def _ask(
        self, items: Sequence[Item], point: str, keep: int | float | None, take: Callable[[Answer], None]
    ) -> None:
        """All of ``items``, :attr:`Remote.concurrency` at a time; the first error ends it."""
        form = Form(str(self.task.model), str(self.task.prompt), self.task.max_new_tokens)
        waiting, gone = iter(items), asyncio.Event()

        async def work() -> None:
            for item in waiting:
                if gone.is_set():
                    return
                if item.id in self.source.problems:
                    continue
                try:  # in a thread, so that no other request's clock runs while a picture is read
                    body = await asyncio.to_thread(form.body, self._worded(item), keep)
                except (OSError, ValueError) as error:
                    self.source.problems[item.id] = reason_of(item, error)
                    continue
                take(await self._answer(body, item, point))

        workers = [asyncio.ensure_future(work()) for _ in range(min(self.task.concurrency, len(items)))]
        try:
            await asyncio.gather(*workers)
        except UnreachableError as error:
            gone.set()
            await asyncio.gather(*workers, return_exceptions=True)  # what is under way may still be answered
            there = len(self.answers.of(point))
            raise UnreachableError(
                f"{error}. {counted(there, 'answer')} of {point} are in {self.answers.path}; the same command asks the "
                "other questions once the server is there again"
            ) from error
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _worded(self, item: Item) -> Item:
        if self.task.prompt != WORLD_PROMPT or self.task.data != "world":
            return item
        return Item(item.id, item.text.capitalize(), item.answers, item.type, item.image)

    async def _answer(self, body: dict[str, Any], item: Item, point: str) -> Answer:
        began = time.time()
        try:
            reply = await self.client.chat(body)
        except RefusedError as error:
            return Answer(point, item.id, self.task._session, began, 0.0, 1, refused=str(error))
        said, right = self.source.read(item, reply.text)
        return Answer(
            point, item.id, self.task._session, reply.began, reply.latency_s, reply.tries, said, right,
            reply.prompt_tokens, reply.answer_tokens, reply.cut,
        )  # fmt: skip


class _Check:
    """Sees to it that ``keep`` did something: a server that does not know it may take it without a word."""

    def __init__(self, keep: int | float | None, baseline: dict[int, Answer] | None) -> None:
        self.keep, self.baseline = keep, baseline or {}
        self.same = self.shorter = 0

    def see(self, answer: Answer) -> None:
        """Raises :class:`IgnoredKeepError` where the first answers show that nothing changes, or cannot show it."""
        if self.keep is None:
            return
        if answer.prompt_tokens is None:
            raise IgnoredKeepError("the server reports no usage.prompt_tokens, so that nobody can see what --keep did")
        whole = self.baseline.get(answer.id)
        if (self.keep == 1.0 and isinstance(self.keep, float)) or whole is None:
            return
        if answer.prompt_tokens < (whole.prompt_tokens or 0):
            self.shorter += 1
        else:
            self.same += 1
        if not self.shorter and self.same >= ENOUGH:
            self.end()

    def end(self) -> None:
        """Raises :class:`IgnoredKeepError` where no prompt got shorter."""
        if self.same and not self.shorter:
            raise IgnoredKeepError(
                f"prompts with {keep_text(self.keep)} are as long as with all tokens: the server ignores "
                "tokenreduce_keep (is it one of `tokenreduce serve`?), or the images have no more tokens"
            )


def _hint(message: str, keep: int | float | None) -> str:
    """What to do about a refusal of per-request settings."""
    if keep is None or not any(word in message for word in ("mm_processor_kwargs", "mm-kwargs", "mm_kwargs")):
        return ""
    return ". Fix: start the server with --trust-request-mm-kwargs"
