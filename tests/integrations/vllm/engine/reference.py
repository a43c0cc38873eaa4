"""What transformers with a patched model answers to the cases of ``run_engine.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokenreduce as tr


def answers(folder: str, spec: str | None, positions: str, cases: list[dict[str, Any]], new: int) -> Iterator[dict]:
    """Ids, best log-probabilities and length of the prompt that the language model saw, case by case."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    for case in cases:
        yield _answer(model, _inputs(processor, case), _reducer(spec, case, positions), new)


def _reducer(spec: str | None, case: dict[str, Any], positions: str) -> tr.Reducer | None:
    if spec is None:
        return None
    reducer: Any = tr.get_method(spec, "projector")
    return replace(reducer, positions=positions, keep=case.get("keep", reducer.keep))


def _inputs(processor: Any, case: dict[str, Any]) -> Any:
    given: dict[str, Any] = {}
    if "images" in case:
        given["images"] = [Image.open(file).convert("RGB") for file in case["images"]]
    if "video" in case:
        frames, fps = np.load(case["video"]), case["fps"]
        told = dict(
            fps=fps, duration=len(frames) / fps, total_num_frames=len(frames), frames_indices=list(range(len(frames)))
        )
        given.update(videos=[frames], do_sample_frames=False, video_metadata=[told])
    return processor(text=case["prompt"], return_tensors="pt", **given)


@torch.no_grad()
def _answer(model: Any, inputs: Any, reducer: tr.Reducer | None, new: int) -> dict[str, Any]:
    with nullcontext() if reducer is None else tr.patched(model, reducer), tr.record(model) as trace:
        out = model.generate(
            **inputs, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=None, use_cache=True,
        )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    left = length if not trace.plans or trace.plans[0] is None else trace.plans[0].k
    return {
        "prompt": left, "ids": out.sequences[0, length:].tolist(),
        "best": [step[0].float().log_softmax(-1).max().item() for step in out.logits],
    }  # fmt: skip
