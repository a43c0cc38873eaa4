"""Questions about clips: layouts, answers, and which frames are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tokenreduce.bench.clip_frames import Sampler, thumbnails
from tokenreduce.bench.clips import ClipItem, chosen, lettered, load_clips

OPTIONS = ["a red cup", "a blue cup", "nothing at all"]


def dump(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def lines(path: Path, values) -> str:
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return str(path)


# -- multiple choice
@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("A", 0), ("b", 1), ("(C)", 2), ("B.", 1), (" b) ", 1), ("C: nothing", 2), ("B. a red cup", 1),
        ("A blue cup", 1), ("a red cup.", 0), ("The answer is (B).", 1), ("Answer: C", 2), ("option B is right", 1),
        ("B because it is blue", 1), ("It shows nothing at all, really", 2), ("I see a blue cup there", 1),
        ("a red cup or a blue cup", None), ("A cup", None), ("D", None), ("", None), ("?", None), ("Cups", None),
    ],
)  # fmt: skip
def test_what_an_answer_names(said, right):
    assert chosen(said, OPTIONS) == right


def test_options_that_are_letters_or_numbers_are_texts_first():
    assert chosen("3", ["1", "3"]) == 1
    assert chosen("A", ["B", "A"]) == 1
    assert chosen("3.", ["1", "3"]) == 1
    assert chosen("yes", ["yes", "Yes."]) is None
    assert chosen("yes", ()) is None
    assert lettered("Which?", ["x", "y"]).splitlines() == ["Which?", "A. x", "B. y", "Answer with the option's letter."]


# -- JSONL
def test_lines_of_ones_own(tmp_path):
    clip = {"video": "sub/a.mp4", "question": "what"}
    path = lines(tmp_path / "q.jsonl", [
        {**clip, "answer": "cat", "type": "kind"},
        {**clip, "answer": ["cat", "dog"]},
        {**clip, "answer": "A blue cup", "options": OPTIONS},
        {**clip, "answer": "(c)", "options": OPTIONS, "start": 1, "end": 2.5},
        "",
        "no json",
        {**clip, "answer": "green", "options": OPTIONS},
        {"question": "what", "answer": "cat"},
        {**clip, "answer": "cat", "options": "abc"},
        {**clip, "answer": "cat", "question": " "},
        {**clip, "answer": []},
        {**clip, "answer": "A", "options": OPTIONS, "start": 3, "end": 2},
        ["a"],
    ])  # fmt: skip
    items, problems, notes = load_clips(path)
    assert [(i.answers, i.options, i.type, i.span) for i in items] == [
        (("cat",), (), "kind", None), (("cat", "dog"), (), None, None), (("B",), tuple(OPTIONS), None, None),
        (("C",), tuple(OPTIONS), None, (1.0, 2.5)),
    ]  # fmt: skip
    assert {i.image for i in items} == {tmp_path / "sub/a.mp4"}
    assert notes == ()
    found = [(Path(p["path"]).name, p["reason"]) for p in problems.values()]
    assert [where for where, _ in found] == [f"q.jsonl line {n}" for n in (6, 7, 8, 9, 10, 11, 12, 13)]
    for (_, reason), word in zip(
        found,
        ("no JSON", "'green' is not among the options a red cup, a blue cup, nothing at all", "no 'video'",
         "options are a list of 2 to 26", "question is empty", "answer is empty", "start first", "no question"),
        strict=True,
    ):  # fmt: skip
        assert word in reason
    assert not {i.id for i in items} & set(problems)
    # The folder that holds the file means it, as long as there is one.
    assert load_clips(str(tmp_path)).items == items
    (tmp_path / "other.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"not one JSONL file \(other.jsonl, q.jsonl\)"):
        load_clips(str(tmp_path))


def test_some_questions_are_drawn_by_seed(tmp_path):
    path = lines(tmp_path / "q.jsonl", [{"video": "a.mp4", "question": f"q{i}", "answer": "x"} for i in range(30)])
    some = load_clips(path, limit=7, seed=1).items
    assert len(some) == 7
    assert [i.id for i in some] == sorted(i.id for i in some)
    assert some == load_clips(path, limit=7, seed=1).items != load_clips(path, limit=7, seed=2).items
    assert len(load_clips(path, limit=99).items) == 30


def test_data_without_questions_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no questions about clips\. Layouts: .*mvbench.*egoschema"):
        load_clips(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="give world, world2, a JSONL file"):
        load_clips(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"holds no question about a clip that can be asked \(layout jsonl\)"):
        load_clips(lines(tmp_path / "q.jsonl", []))
    with pytest.raises(ValueError, match=r"(?s)layout jsonl\):.*line 1: it is no JSON"):
        load_clips(lines(tmp_path / "q.jsonl", ["oh"]))
    with pytest.raises(ValueError, match="layout is one of auto, world, jsonl, mvbench"):
        load_clips("world", "nextqa")
    with pytest.raises(ValueError, match="layout 'world' is for --data world"):
        load_clips(str(tmp_path / "q.jsonl"), "world")
    with pytest.raises(ValueError, match="unknown split"):
        load_clips("world", split="exam", limit=2)
    (tmp_path / "a.txt").write_text("what")
    with pytest.raises(ValueError, match="a JSONL file or a folder, not"):
        load_clips(str(tmp_path / "a.txt"))


def test_the_world(tmp_path):
    items = load_clips("world", limit=12, seed=3).items
    assert len({i.type for i in items}) == 6
    assert items[0].image.shape == (8, 112, 112, 3)
    assert not any(i.options for i in items)


# -- data sets
def test_mvbench(tmp_path):
    row = {"question": "what", "candidates": ["x", "y"], "answer": "y"}
    for name in (
        "star/Charades_v1_480/a.mp4",
        "elsewhere/b.mp4",
        "one/c.mp4",
        "two/c.mp4",
        "tvqa/frames_fps3_hq/d/1.jpg",
    ):
        (tmp_path / "video" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "video" / name).write_bytes(b"")
    dump(tmp_path / "json/action_sequence.json", [
        {**row, "video": "a.mp4", "start": 1.5, "end": 4.0}, {**row, "video": "b.mp4"}, {**row, "video": "c.mp4"},
        {**row, "video": "a.mp4", "answer": "z"}, {**row, "video": "gone.mp4"},
    ])  # fmt: skip
    dump(tmp_path / "json/episodic_reasoning.json", [{**row, "video": "d"}])
    (tmp_path / "json/moving_count.json").write_text("{]")
    items, problems, _ = load_clips(str(tmp_path))
    clips = tmp_path / "video/star/Charades_v1_480"
    assert [(i.image, i.type, i.answers, i.span) for i in items] == [
        (clips / "a.mp4", "action_sequence", ("B",), (1.5, 4.0)),
        (tmp_path / "video/elsewhere/b.mp4", "action_sequence", ("B",), None),
        (clips / "gone.mp4", "action_sequence", ("B",), None),
        (tmp_path / "video/tvqa/frames_fps3_hq/d", "episodic_reasoning", ("B",), None),
    ]
    assert items[-1].rate == 3
    reasons = [p["reason"] for p in problems.values()]
    assert "2 files below" in reasons[0]
    assert "'z' is not among the options x, y" in reasons[1]
    assert "no JSON" in reasons[2]


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_videomme(tmp_path, kind):
    options = ["A. Apples.", "B. Pears.", "C. Plums.", "D. None."]
    rows = [
        {
            "videoID": "one",
            "question": "what",
            "options": options,
            "answer": "C",
            "duration": "short",
            "task_type": "t",
        },
        {"videoID": "two", "question": "what", "options": options, "answer": "D", "duration": None, "task_type": "t"},
        {"videoID": "two", "question": "what", "options": options, "answer": "E", "duration": "long", "task_type": "t"},
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/two.mkv").write_bytes(b"")
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        (tmp_path / "videomme").mkdir()
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "videomme/test-00000-of-00001.parquet")
    else:
        dump(tmp_path / "videomme.json", rows)
    items, problems, _ = load_clips(str(tmp_path))
    assert [(i.image.name, i.options, i.answers, i.type) for i in items] == [
        ("one.mp4", ("Apples.", "Pears.", "Plums.", "None."), ("C",), "short"),
        ("two.mkv", ("Apples.", "Pears.", "Plums.", "None."), ("D",), "t"),
    ]
    assert [p["reason"] for p in problems.values()] == ["the answer 'E' is no letter of 4 options"]
    if kind == "parquet":
        (tmp_path / "videomme/more.parquet").write_bytes(b"broken")
        assert "no Parquet file" in next(iter(load_clips(str(tmp_path)).problems.values()))["reason"]


def test_egoschema(tmp_path):
    options = {f"option {i}": f"they do {i}" for i in range(5)}
    dump(tmp_path / "questions.json", [{"q_uid": u, "question": "what", **options} for u in ("u1", "u2", "u3", "u4")])
    dump(tmp_path / "subset_answers.json", {"u1": 4, "u3": 7})
    items, problems, notes = load_clips(str(tmp_path))
    assert [(i.image, i.answers, len(i.options)) for i in items] == [(tmp_path / "videos/u1.mp4", ("E",), 5)]
    assert [p["reason"] for p in problems.values()] == ["the answer 7 is not among the options 0 to 4"]
    assert notes == ("2 questions without a public answer are left out",)


# -- frames
@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    pytest.importorskip("av")
    from films import film

    shades = [0.2] * 8 + [0.9] * 4 + [0.5] * 20
    return film(tmp_path_factory.mktemp("films") / "a.mp4", 32, rate=8, shades=shades)


def read(sampler: Sampler, clip: Path, span=None) -> list[int]:
    from films import shown

    return [shown(f) for f in sampler.read(ClipItem(0, "what", ("x",), None, clip, (), span)).frames]


def test_which_frames_are_read(clip):
    assert read(Sampler(4), clip) == [0, 10, 20, 31]
    assert read(Sampler(None, 2.0), clip) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert read(Sampler(3), clip, (1.0, 2.0)) == [8, 12, 16]
    assert read(Sampler(None, 4.0), clip, (1.0, 2.0)) == [8, 10, 12, 14, 16]
    assert read(Sampler(5), clip, (2.01, 2.02)) == [16]  # nothing begins there: what is on screen
    assert len(read(Sampler(99), clip)) == 32
    times = Sampler(3).read(ClipItem(0, "what", ("x",), None, clip)).times
    assert times == pytest.approx([0, 15 / 8, 31 / 8], abs=1e-3)


def test_diverse_frames_show_all_that_there_is():
    from films import painted

    clip = np.stack([painted(0, 96, 72, s) for s in [0.2] * 8 + [0.9] * 2 + [0.5] * 20])
    item = ClipItem(0, "what", ("x",), None, clip)
    picks = Sampler(3, sampling="diverse").read(item).times.astype(int).tolist()
    assert [int(p >= 8) + int(p >= 10) for p in picks] == [0, 1, 2]
    even = Sampler(3).read(item).times.astype(int).tolist()
    assert even == [0, 14, 29]
    assert thumbnails(clip[:2]).shape == (2, 16 * 16 * 3)
    assert np.allclose(thumbnails(clip[:1]).mean(1), 0, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frames": 0}, "frames is an int >= 1"), ({"frames": 8, "fps": 1.0}, "one of frames and fps"),
        ({"frames": None}, "one of frames and fps"), ({"frames": None, "fps": -1.0}, "fps is a number > 0"),
        ({"sampling": "aks"}, "sampling is one of uniform, diverse"),
        ({"frames": None, "fps": 1.0, "sampling": "diverse"}, "takes a number of frames"),
    ],
)  # fmt: skip
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        Sampler(**settings)


def test_files_that_are_no_clips(tmp_path):
    for name, data in (("none.mp4", None), ("text.mp4", b"hello there"), ("empty.mp4", b"")):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            Sampler().read(ClipItem(0, "what", ("x",), None, tmp_path / name))


def test_folders_of_frames_are_shown_at_their_rate(tmp_path):
    from PIL import Image

    from tokenreduce.bench.clip_frames import Sampler

    folder = tmp_path / "video/tvqa/frames_fps3_hq/clip"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / f"{i + 1}.png")
    row = {"question": "what", "candidates": ["x", "y"], "answer": "y", "video": "clip", "start": 1.0, "end": 3.0}
    dump(tmp_path / "json/episodic_reasoning.json", [row])
    (item,), problems, _ = load_clips(str(tmp_path))
    assert problems == {}
    shown = Sampler(frames=3).read(item)
    assert shown.times.tolist() == [1, 2, 3]
    assert shown.frames[:, 0, 0, 0].tolist() == [60, 120, 180]
    assert Sampler(frames=None, fps=1.0).read(item).times.tolist() == [1, 2, 3]
    lines = [{"question": "what", "answer": "y", "video": str(folder), **more} for more in ({"fps": 6}, {}, {"fps": 0})]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    items, problems, _ = load_clips(str(tmp_path / "q.jsonl"))
    assert [i.rate for i in items] == [6, None]
    assert "above 0, not 0" in problems[2]["reason"]
    assert Sampler(frames=2).read(items[0]).times.tolist() == pytest.approx([0, 11 / 6])
    assert Sampler(frames=2).read(items[1]).times.tolist() == [0, 11]
    assert len(Sampler(frames=None, fps=4.0).read(items[1]).times) == 12
