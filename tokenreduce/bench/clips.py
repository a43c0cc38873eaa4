"""Questions about clips: of the generated world, of one's own, and in the layouts of MVBench, Video-MME and EgoSchema.

Nothing is downloaded: a layout is a folder as the data set's authors publish it, with the videos unpacked.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenreduce.bench.mvbench import MVBENCH, MVBENCH_RATE
from tokenreduce.bench.questions import SECOND, WORLD_QUESTIONS, Item, normalised
from tokenreduce.common.words import are, counted

__all__ = ["LAYOUTS", "WORLDS", "ClipItem", "Clips", "chosen", "lettered", "load_clips"]

#: Data that is generated.
WORLDS = ("world", *SECOND)
LAYOUTS = ("auto", "world", "jsonl", "mvbench", "videomme", "egoschema")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
EXAMPLE = '{"video": "clip.mp4", "question": "...", "answer": "...", "options": ["...", "..."], "type": "..."}'


@dataclass(frozen=True)
class ClipItem(Item):
    """A question about a clip: ``image`` is a file, or frames (T,H,W,3) uint8 one second apart.

    Of multiple choice, ``options`` are the texts and ``answers`` the letter. ``span`` are seconds of the file between
    which frames are taken, all of it when None. Where the clip is a folder of frames, ``rate`` of them are a second.
    """

    options: tuple[str, ...] = ()
    span: tuple[float, float] | None = None
    rate: float | None = None

    def open(self) -> Any:
        raise TypeError("a clip is read by a Sampler")


class Clips(NamedTuple):
    """Questions; by number, those that cannot be asked ({"path", "reason"}); and what else there is to say."""

    items: list[ClipItem]
    problems: dict[int, dict[str, str]]
    notes: tuple[str, ...] = ()


def load_clips(data: str, layout: str = "auto", split: str = "test", limit: int | None = None, seed: int = 0) -> Clips:
    """The questions of ``data``.

    Args:
        data: ``world``, ``world2`` or ``world2-all`` (clips generated from the seeds of ``split``, types in turn; of
            the second world those that ``world-llava-2`` has learned, or all), a JSONL file, or a folder.
        layout: "auto" looks at what is there. "jsonl": lines ``{"video": path, "question": ..., "answer": ...,
            "options": [...], "type": ...}``, options and type optional, paths relative to the file; with options, the
            answer is one of them or its letter; a video may be a folder of frames, ``"fps"`` of them per second.
            "mvbench": json/TASK.json and video/. "videomme": Parquet or JSON with
            videoID, question, options, answer, and data/VIDEOID.mp4; the type is the duration, or the task_type.
            "egoschema": questions.json, subset_answers.json and videos/Q_UID.mp4.
        limit: that many of the questions, drawn by ``seed``; without it all, and 2,400 of a world.

    A line that is no question, or whose answer is not among the options, is a problem and no error. Whether clips are
    there and whole shows when they are read.

    Raises ``ValueError`` for an unknown layout or split and where no question is left, ``FileNotFoundError`` for data
    that is not there, ``ImportError`` where Parquet cannot be read.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, not {layout!r}")
    if data in WORLDS and layout in ("auto", "world"):
        return Clips(_world(data, split, WORLD_QUESTIONS if limit is None else limit, seed), {})
    if layout == "world":
        raise ValueError(f"layout 'world' is for --data {', '.join(WORLDS)}, not {data}")
    path = Path(data).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; give world, world2, a JSONL file ({EXAMPLE}) or a folder with clips"
        )
    kind = _layout(path) if layout == "auto" else layout
    items: list[ClipItem] = []
    problems: dict[int, dict[str, str]] = {}
    notes: list[str] = []
    number = -1
    for number, (place, make) in enumerate(_READERS[kind](path, notes)):
        try:
            items.append(make(number))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            problems[number] = {"path": place, "reason": reason.splitlines()[0]}
    if not items:
        first = "".join(f"\n  {p['path']}: {p['reason']}" for p in list(problems.values())[:5])
        raise ValueError(
            f"{path} holds no question about a clip that can be asked (layout {kind}){':' if first else ''}{first}"
        )
    if limit is not None and limit < len(items):
        items = [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]
    return Clips(items, problems, tuple(notes))


# -- multiple choice ---------------------------------------------------------------------------------------------------
def lettered(question: str, options: Sequence[str]) -> str:
    """``question`` with its ``options`` as lines "A. ...", and how to answer.

    >>> print(lettered("Which way?", ["left", "right"]))
    Which way?
    A. left
    B. right
    Answer with the option's letter.
    """
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, "Answer with the option's letter."])


def chosen(answer: str, options: Sequence[str]) -> int | None:
    """Which of ``options`` a model's ``answer`` names, by letter or by text; None when it names none, or several.

    In this order: the text of an option; a letter alone, in brackets or before punctuation; "answer is B" or "option
    B"; a letter before a space, where it cannot be the word "A" or "I"; the only option whose words stand in the
    answer.

    >>> [chosen(a, ["left", "right"]) for a in ("B", "(b)", "B. right", "The answer is B.", "right", "Right, I think")]
    [1, 1, 1, 1, 1, 1]
    >>> chosen("A ball moves right", ["left", "right"]), chosen("left or right", ["left", "right"])
    (1, None)
    """
    if not options:
        return None
    text = answer.strip()
    said = normalised(text)
    same = [i for i, option in enumerate(options) if said and said == normalised(option)]
    if len(same) == 1:
        return same[0]
    known = LETTERS[: len(options)]
    for pattern in (
        rf"^\W*([{known}{known.lower()}])\W*$",
        rf"^[\s(\[*\"']*([{known}])\s*[)\].:,*]",
        rf"(?i:\b(?:answer|option|choice)\b(?:\s+is)?)[\s:*(\[]*([{known}])\b",
        rf"^([{known.replace('A', '').replace('I', '') or '#'}])\s",
    ):
        found = re.search(pattern, text)
        if found:
            return known.index(found.group(1).upper())
    there = [i for i, option in enumerate(options) if f" {normalised(option)} " in f" {said} " and normalised(option)]
    return there[0] if len(there) == 1 else None


# -- questions ---------------------------------------------------------------------------------------------------------
_Make = Callable[[int], ClipItem]


def _world(data: str, split: str, questions: int, seed: int) -> list[ClipItem]:
    from tokenreduce.zoo import evaluation, evaluation2
    from tokenreduce.zoo.world2 import VIDEO_TYPES

    asked: Sequence[Any]
    if data == "world":
        asked = evaluation.cases(split, seed, questions, evaluation.KINDS_OF_TYPES["video"])
    else:
        types = evaluation2.learned_types(VIDEO_TYPES) if data == SECOND[0] else VIDEO_TYPES
        asked = evaluation2.cases(split, seed, questions, types)
    return [ClipItem(i, c.text, (c.answer,), c.type, c.about.frames) for i, c in enumerate(asked)]


def _layout(path: Path) -> str:
    """What a file or folder looks like."""
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise ValueError(f"questions about clips are world, world2, a JSONL file or a folder, not {path}")
        return "jsonl"
    if any((path / "json").glob("*.json")):
        return "mvbench"
    if (path / "questions.json").is_file() and (path / "subset_answers.json").is_file():
        return "egoschema"
    if any(path.glob("*.jsonl")):
        return "jsonl"
    if _tables(path):
        return "videomme"
    raise ValueError(
        f"{path} holds no questions about clips. Layouts: a JSONL file (jsonl), json/TASK.json and video/ (mvbench), "
        f"Parquet or JSON and data/ (videomme), questions.json and subset_answers.json (egoschema)"
    )


def _item(
    number: int,
    video: Path,
    question: Any,
    answer: Any,
    options: Any = None,
    kind: Any = None,
    span: Any = None,
    rate: Any = None,
) -> ClipItem:
    """Checked and in one form. Raises ``ValueError`` that says what is wrong."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    texts = tuple(str(o).strip() for o in options) if options is not None else ()
    name = None if kind is None else str(kind)
    if options is None:
        answers = tuple(str(a) for a in (answer if isinstance(answer, list) else [answer]))
        if not answers or not all(a.strip() for a in answers):
            raise ValueError("the answer is empty")
        return ClipItem(number, question, answers, name, video, (), span, rate)
    if isinstance(options, str) or not 2 <= len(texts) <= len(LETTERS) or not all(texts):
        raise ValueError(f"options are a list of 2 to {len(LETTERS)} texts, not {options!r}")
    said = str(answer).strip()
    right = [i for i, o in enumerate(texts) if o == said] or [
        i for i, o in enumerate(texts) if normalised(o) == normalised(said)
    ]
    if not right and said.strip("().").upper() in LETTERS[: len(texts)] and said.strip("()."):
        right = [LETTERS.index(said.strip("().").upper())]
    if not right:
        raise ValueError(f"the answer {said!r} is not among the options {', '.join(texts)}")
    return ClipItem(number, question, (LETTERS[right[0]],), name, video, texts, span, rate)


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    """Place and value of every line of a JSONL file, or entry of a JSON list; a line that is no JSON is an error in
    place of its value."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    yield f"{file} line {number}", json.loads(line)
                except ValueError as error:
                    yield f"{file} line {number}", ValueError(f"it is no JSON ({error}); write {EXAMPLE}")
        return
    try:
        made = json.loads(text)
    except ValueError as error:
        yield str(file), ValueError(f"it is no JSON ({error})")
        return
    if isinstance(made, dict):
        made = next((v for v in made.values() if isinstance(v, list)), None)
    if not isinstance(made, list):
        yield str(file), ValueError("it is no list of questions")
        return
    for number, each in enumerate(made, 1):
        yield f"{file} entry {number}", each


def _checked(value: Any) -> dict[str, Any]:
    if isinstance(value, Exception):
        raise value
    if not isinstance(value, dict):
        raise ValueError(f"it is no question; write {EXAMPLE}")
    return value


def _jsonl(path: Path, notes: list[str]) -> Iterator[tuple[str, _Make]]:
    file = path
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "none"
            raise ValueError(f"{path} has not one JSONL file ({names}); name the file itself")
        file = found[0]
    for place, value in _records(file):

        def make(number: int, value: Any = value) -> ClipItem:
            line = _checked(value)
            span = line.get("start"), line.get("end")
            return _item(
                number, file.parent / str(line["video"]), line["question"], line["answer"], line.get("options"),
                line.get("type"), _span(*span), _rate(line.get("fps")),
            )  # fmt: skip

        yield place, make


def _rate(value: Any) -> float | None:
    """Frames per second of a folder of frames."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"fps is the number of frames per second of a folder of frames, above 0, not {value!r}")
    return float(value)


def _span(start: Any, end: Any) -> tuple[float, float] | None:
    if start is None or end is None:
        return None
    a, b = float(start), float(end)
    if not 0 <= a <= b:
        raise ValueError(f"start and end are seconds, start first, not {start} and {end}")
    return a, b


def _mvbench(path: Path, notes: list[str]) -> Iterator[tuple[str, _Make]]:
    folders = {task: folder for folder, tasks in MVBENCH.items() for task in tasks}
    videos = path / "video"
    named: dict[str, list[Path]] = {}
    for file in sorted(videos.rglob("*")):
        named.setdefault(file.name, []).append(file)
    for table in sorted((path / "json").glob("*.json")):
        for place, value in _records(table):

            def make(number: int, value: Any = value, task: str = table.stem) -> ClipItem:
                line = _checked(value)
                name = str(line["video"])
                clip = videos / folders.get(task, "") / name
                if not clip.exists():
                    found = named.get(Path(name).name, [])
                    if len(found) > 1:
                        raise ValueError(
                            f"{len(found)} files below {videos} are named {name}; put it into {clip.parent}"
                        )
                    clip = found[0] if found else clip
                span = _span(line.get("start"), line.get("end"))
                return _item(
                    number, clip, line["question"], line["answer"], line["candidates"], task, span, MVBENCH_RATE
                )

            yield place, make


def _tables(path: Path) -> list[Path]:
    """Files with questions in the layout of Video-MME."""
    places = [path, path / "videomme"]
    return [f for p in places for end in ("parquet", "jsonl", "json") for f in sorted(p.glob(f"*.{end}"))]


def _videomme(path: Path, notes: list[str]) -> Iterator[tuple[str, _Make]]:
    for table in _tables(path):
        for place, value in _parquet(table) if table.suffix == ".parquet" else _records(table):

            def make(number: int, value: Any = value) -> ClipItem:
                line = _checked(value)
                name = str(line["videoID"])
                clips = [path / "data" / f"{name}{end}" for end in SUFFIXES]
                clip = next((c for c in clips if c.exists()), clips[0])
                options = [re.sub(r"^\s*\(?[A-Z][.):]\s*", "", str(o)) for o in line["options"]]
                letter = str(line["answer"]).strip().strip("().").upper()
                if len(letter) != 1 or letter not in LETTERS[: len(options)]:
                    raise ValueError(f"the answer {line['answer']!r} is no letter of {len(options)} options")
                kind = line.get("duration") or line.get("task_type")
                return _item(number, clip, line["question"], options[LETTERS.index(letter)], options, kind)

            yield place, make


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{file} needs pyarrow: pip install 'tokenreduce[data]'") from error
    try:
        rows: Iterable[Any] = parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        yield str(file), ValueError(f"it is no Parquet file ({error})")
        return
    for number, row in enumerate(rows, 1):
        yield f"{file} row {number}", row


def _egoschema(path: Path, notes: list[str]) -> Iterator[tuple[str, _Make]]:
    table = path / "subset_answers.json"
    try:
        answers = json.loads(table.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{table} is no JSON: {error}") from error
    hidden = 0
    for place, value in _records(path / "questions.json"):
        uid = value.get("q_uid") if isinstance(value, dict) else None
        if uid is not None and uid not in answers:  # 4,531 of 5,031 answers are not public
            hidden += 1
            continue

        def make(number: int, value: Any = value) -> ClipItem:
            line = _checked(value)
            uid = str(line["q_uid"])
            options = [str(line[f"option {i}"]) for i in range(5)]
            right = int(answers[uid])
            if not 0 <= right < len(options):
                raise ValueError(f"the answer {right} is not among the options 0 to {len(options) - 1}")
            clips = [path / "videos" / f"{uid}{end}" for end in SUFFIXES]
            clip = next((c for c in clips if c.exists()), clips[0])
            return _item(number, clip, line["question"], options[right], options)

        yield place, make
    if hidden:
        notes.append(f"{counted(hidden, 'question')} without a public answer {are(hidden)} left out")


_READERS: dict[str, Callable[[Path, list[str]], Iterator[tuple[str, _Make]]]] = {
    "jsonl": _jsonl, "mvbench": _mvbench, "videomme": _videomme, "egoschema": _egoschema,
}  # fmt: skip
