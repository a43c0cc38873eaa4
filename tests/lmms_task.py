"""A task of lmms-eval and its model, without a network: ``python tests/lmms_task.py OUT_DIR`` writes ``model`` (the
embedded world-llava as ``save_pretrained`` writes it) and ``task`` (questions about the generated world)."""

from __future__ import annotations

import io
import sys
from pathlib import Path

NAME = "tokenreduce_world"
YAML = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
  cache_dir: {cache}
task: {name}
test_split: test
output_type: generate_until
doc_to_visual: !function world_utils.doc_to_visual
doc_to_text: !function world_utils.doc_to_text
doc_to_messages: !function world_utils.doc_to_messages
doc_to_target: answer
process_results: !function world_utils.process_results
generation_kwargs:
  max_new_tokens: 1
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
import io

from PIL import Image


def doc_to_visual(doc):
    return [Image.open(io.BytesIO(doc["picture"])).convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": doc_to_visual(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def process_results(doc, results):
    return {"accuracy": float(results[0].strip() == doc["answer"])}
"""
#: The form that world-llava was trained on: the picture, a space, the question.
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def save_model(folder: Path) -> Path:
    """``world-llava`` and its processor, with a chat template."""
    from tokenreduce import zoo

    made = zoo.load("world-llava")
    made.model.save_pretrained(folder)
    made.processor.chat_template = TEMPLATE.replace("<image>", made.processor.image_token)
    made.processor.save_pretrained(folder)
    return folder


def save_task(folder: Path, questions: int = 24) -> Path:
    """A folder for ``--include_path``."""
    import pyarrow
    from pyarrow import parquet

    from tokenreduce.bench.questions import load_questions

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for item in load_questions("world", limit=questions):
        file = io.BytesIO()
        item.open().save(file, "PNG")
        rows.append({"picture": file.getvalue(), "question": item.text, "answer": item.answers[0]})
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "world.parquet")
    text = YAML.format(file=folder.resolve() / "world.parquet", cache=folder.resolve() / "cache", name=NAME)
    (folder / f"{NAME}.yaml").write_text(text)
    (folder / "world_utils.py").write_text(UTILS)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/lmms_task.py OUT_DIR")
    print(save_model(Path(sys.argv[1]) / "model"), save_task(Path(sys.argv[1]) / "task"))
