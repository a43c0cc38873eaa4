"""The functions behind the page, without a browser."""

from __future__ import annotations

import ast
import dataclasses
import html
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import stored_rows
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("plotly")

import gradio as gr

from tokenreduce.bench.turns import Turns
from tokenreduce.demo import stored
from tokenreduce.demo.answers import NAMES, put, reducers_from
from tokenreduce.demo.app import build
from tokenreduce.demo.ask import missing
from tokenreduce.demo.common import chosen, explain, fault, in_turn, literal, method_choices, received
from tokenreduce.demo.image import drawn, facts, probabilities
from tokenreduce.demo.store import Store
from tokenreduce.demo.trade import benchmarks, methods_of, rows_of, task_of
from tokenreduce.measure.image import clock_image, compare_image
from tokenreduce.zoo.examples import digit_examples


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


@pytest.fixture(scope="module")
def comparison(store):
    loaded = store.image("digits-vit")
    return loaded, compare_image(loaded, digit_examples(1)[0].image, "tome:keep=0.4")


def test_the_store_serves_only_what_is_on_the_page(store) -> None:
    assert "digits-vit" in store.images
    assert store.image("digits-vit") is store.image("digits-vit")
    with pytest.raises(ValueError, match="not on this page"):
        store.image("timm:vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="not on this page"):
        store.language("some/model")


def test_a_model_of_ones_own_stands_first(tmp_path: Path) -> None:
    import timm

    made = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    folder = tmp_path / "mine"
    timm.models.save_for_hf(made, folder, model_args={"img_size": 32, "depth": 2}, safe_serialization=True)
    own = Store(f"timm:vit_tiny_patch16_224@{folder}?img_size=32&depth=2")
    assert own.images[0] == own.own
    assert "tome" in own.methods(own.own)["encoder"]
    assert own.own not in benchmarks(own).values()  # no labelled images were given
    assert own.own in benchmarks(Store(own.own, data="/data/pictures")).values()


def test_methods_come_with_their_budget() -> None:
    (reducer,) = chosen("encoder", "tome", 40)
    assert reducer.spec() == "tome:keep=0.4"
    assert chosen("encoder", "none", 40) == ()
    assert type(chosen("projector", "random", 50)[0]).stage == "projector"
    labels = dict(method_choices("language", ["fastv", "dart"], optional=True))
    assert labels["none"] == "none"
    assert any(text.startswith("fastv") and "reads the question" in text for text in labels)
    assert not any(text.startswith("dart") and "reads" in text for text in labels)


def test_controls_become_the_reducers_of_each_column() -> None:
    values = ["none", 20, "divprune", 30, "none", 5, "tome", 50, "none", 20, "fastv", 20]
    a, b = reducers_from(values, ["encoder", "projector", "language"])
    assert [r.spec() for r in a] == ["divprune:keep=0.3"]
    assert [r.spec() for r in b] == ["tome:keep=0.5", "fastv:keep=0.2"]
    with pytest.raises(ValueError, match=f"reduction {NAMES[1]} names no method"):
        reducers_from([*values[:6], "none", 5, "none", 5, "none", 5], ["encoder", "projector", "language"])


def test_predictions_are_probabilities(comparison) -> None:
    loaded, made = comparison
    shares = probabilities(loaded, made.stock.outputs)
    assert next(iter(shares)) == digit_examples(1)[0].truth
    assert sum(shares.values()) <= 1 + 1e-6
    assert probabilities(loaded, made.stock.outputs, most=2).keys() == set(list(shares)[:2])


def test_facts_show_both_sides_and_the_clock(comparison) -> None:
    loaded, made = comparison
    assert "measuring" in facts(made, None, 4)
    clock = clock_image(loaded, digit_examples(1)[0].image, made.reducers, batch=4, rounds=1)
    text = facts(made, clock, 4)
    assert "| time for 4 images |" in text
    assert "measuring" not in text
    assert f"| {made.stock.tokens[-1]} | {made.reduced.tokens[-1]} |" in text
    assert f"{100 * made.reduced.flops / made.stock.flops:.1f} %" in text


def test_the_picture_follows_the_layer_and_says_what_is_there(comparison) -> None:
    _, made = comparison
    last, about = drawn(made, 99, "7", side=64)
    assert about.startswith(f"After layer {made.look.depth}: ")
    assert about.endswith("In the picture: 7.")
    first, about = drawn(made, 1, side=64)
    assert about.startswith("After layer 1: ")
    assert "In the picture" not in about
    assert np.asarray(first).shape == np.asarray(last).shape
    assert not np.array_equal(first, last)


def test_notes_below_the_facts_are_literal(comparison) -> None:
    _, made = comparison
    noted = dataclasses.replace(made, notes=("an <image> of *two* tokens",))
    last = facts(noted, None, 4).splitlines()[-1]
    assert html.unescape(last) == "Note: an <image> of *two* tokens"
    assert "<" not in last
    assert "*" not in last


def test_questions_are_checked_before_the_model_runs(store) -> None:
    image = Image.new("RGB", (8, 8))
    for text, words in (("  ", "empty"), ("why " * 200, "at most 400")):
        with pytest.raises(ValueError, match=words):
            put(None, [image], False, text)
    with pytest.raises(ValueError, match="no picture yet"):
        put(None, [], False, "what is this")


def test_uploads_are_deleted_whatever_happens(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "x.png"
    file.write_bytes(b"no image")
    with received(str(file)) as files:
        assert files == [file]
    assert not file.exists()
    file.parent.mkdir()
    file.touch()
    with pytest.raises(ZeroDivisionError), received(str(file)):
        1 / 0  # noqa: B018
    assert not file.parent.exists()


def test_errors_are_told_in_words(caplog) -> None:
    assert explain(ValueError("keep is a number")) == "⚠ keep is a number"
    assert "unexpected KeyError" in explain(KeyError("x"))
    assert "unexpected error" in caplog.text


@pytest.mark.parametrize("text", ["<image> & <b>x</b>", "*a* _b_ `c` [d](http://e)", "${1+1} {{value}} $$x$$ | ~ é"])
def test_texts_of_errors_and_users_are_literal(text: str) -> None:
    assert html.unescape(literal(text)) == text
    assert not set("<>*_`[]{}$|~") & {*literal(text)}
    shown = fault(ValueError(text))
    assert shown.startswith("<p>")
    assert html.unescape(shown) == f"<p>⚠ {text}</p>"


def test_whoever_waits_for_the_machine_is_told_and_whoever_leaves_frees_the_line() -> None:
    turns = Turns()
    first = turns.join()
    waiting = in_turn(turns, lambda text: {"said": text})
    assert next(waiting) == {"said": "waiting for the machine: 1 before you"}
    gone = in_turn(turns, lambda text: {"said": text})
    assert "2 before you" in next(gone)["said"]
    gone.close()
    assert turns.waiting == 2
    first.leave()
    with pytest.raises(StopIteration) as end:
        next(waiting)
    with end.value.value:
        assert turns.waiting == 1
    assert turns.waiting == 0


def test_functions_of_the_page_are_short() -> None:
    """Layout, wiring and work are apart; a function that grows over the screen does two of them."""
    import tokenreduce.demo

    for file in Path(tokenreduce.demo.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, f"{file.name}: {node.name}"


def test_the_ask_tab_says_when_there_is_no_model(store, tmp_path: Path) -> None:
    store = Store()
    store.languages = []
    page = build(store, tmp_path)
    texts = [b.value for b in page.blocks.values() if isinstance(b, gr.Markdown)]
    assert missing() in texts
    assert "--model" in missing()


def test_a_page_has_every_tab_and_no_public_endpoint(store, tmp_path: Path) -> None:
    page = build(store, tmp_path)
    assert [b.label for b in page.blocks.values() if isinstance(b, gr.Tab)] == [
        "Trade-off",
        "Image",
        "Ask",
        "Measure",
        "Your model",
    ]
    assert page.enable_queue is not False
    assert page._queue.max_size is not None
    assert not page.api_open


def test_a_page_without_stored_rows_opens_on_another_tab_and_says_why(store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stored, "FOLDER", tmp_path)
    page = build(store, tmp_path)
    (tabs,) = (b for b in page.blocks.values() if isinstance(b, gr.Tabs))
    assert tabs.selected == "image"
    texts = [html.unescape(b.value or "") for b in page.blocks.values() if isinstance(b, gr.HTML)]
    assert any("there are stored rows of no model" in text for text in texts)
    monkeypatch.setattr(stored, "FOLDER", stored_rows.write(tmp_path / "stored"))
    (tabs,) = (b for b in build(store, tmp_path).blocks.values() if isinstance(b, gr.Tabs))
    assert tabs.selected == "overview"


def test_benchmarks_and_their_methods(store) -> None:
    known = benchmarks(store)
    assert known["digits-vit on held-out digits"] == "digits-vit"
    names = methods_of(store, "digits-vit")
    assert "tome" in names
    assert not {"random", "uniform", "resize"} & {*names}
    task = task_of(store, "digits-vit", 60)
    assert task.settings()["limit"] == 60
    assert task.settings()["data"] == "digits"


def test_rows_are_those_of_the_reports(tmp_path: Path) -> None:
    from tokenreduce.bench.runs import read_run

    rows = [
        {"id": "unreduced", "method": "unreduced", "spec": "", "budget": 1.0, "top1": 0.9, "share": 1.0, "notes": []},
        {"id": "tome@0.5", "method": "tome", "spec": "tome:keep=0.4", "budget": 0.5, "top1": 0.8, "share": 0.5},
        {"id": "evit@0.5", "method": "evit", "spec": "evit", "budget": 0.5, "error": "ValueError: too few\nmore"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    heads, body = rows_of(read_run(file))
    assert heads[:2] == ["budget", "method"]
    assert body[0][1] == "unreduced"
    assert body[1][:2] == ["50 %", "tome:keep=0.4"]
    assert "80.0" in body[1][heads.index("top-1 %")]
    assert body[2][2] == "ValueError: too few"
    assert all(len(line) == len(heads) for line in body)


def test_two_visitors_at_once_do_not_disturb_each_other(store) -> None:
    """Patches of one never show in the other's numbers."""
    loaded, image = store.image("digits-vit"), digit_examples(1)[0].image
    specs = ["tome:keep=0.3", "evit:keep=0.5", "random:keep=0.4", "tome:keep=0.8"]
    alone = {s: compare_image(loaded, image, s).reduced for s in specs}
    wrong: list[str] = []

    def visit(spec: str) -> None:
        for _ in range(4):
            side = compare_image(loaded, image, spec).reduced
            if side.tokens != alone[spec].tokens or not np.array_equal(side.outputs, alone[spec].outputs):
                wrong.append(spec)

    threads = [threading.Thread(target=visit, args=(s,)) for s in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
