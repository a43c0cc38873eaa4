"""Ask one engine of vLLM: ``python run_engine.py JOB.json``, in vLLM's environment. Answers go to the job's ``out``.

A job has ``model`` (folder), ``spec`` (the method), ``architecture`` (where the class is not the usual one), ``engine``
(arguments of ``LLM``), ``new`` (tokens), ``rounds`` (the same prompts again) and ``cases``: ``prompt``, ``images``
(files), ``video`` (an .npy file) with ``fps``, ``keep``. With ``bad``, cases are asked one by one, and one that is
refused has its error in place of an answer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


def main(job: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    from tokenreduce.integrations.vllm.names import ARCHITECTURE, KEEP, SETTING

    overrides = {
        "architectures": [job.get("architecture", ARCHITECTURE)],
        **({SETTING: job["spec"]} if job["spec"] else {}),
    }
    engine = LLM(
        job["model"], hf_overrides=overrides, dtype="float32", max_model_len=1024, enforce_eager=True,
        limit_mm_per_prompt={"image": 2, "video": 1}, seed=0, **job["engine"],
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, logprobs=1)
    prompts = [_prompt(case, KEEP) for case in job["cases"]]
    answers: list[dict[str, Any]] = []
    if job.get("bad"):  # one by one: each is refused alone
        for prompt in prompts:
            try:
                answers.append(_answer(engine.generate([prompt], sampling, use_tqdm=False)[0]))
            except Exception as error:
                answers.append({"error": f"{type(error).__name__}: {error}"})
    else:
        for _ in range(job.get("rounds", 1)):
            answers = [_answer(o) for o in engine.generate(prompts, sampling, use_tqdm=False)]
    Path(job["out"]).write_text(json.dumps(answers))


def _prompt(case: dict[str, Any], key: str) -> dict[str, Any]:
    out: dict[str, Any] = {"prompt": case["prompt"], "multi_modal_data": _media(case)}
    if "keep" in case:
        out["mm_processor_kwargs"] = {case.get("key", key): case["keep"]}
    return out


def _media(case: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from PIL import Image

    out: dict[str, Any] = {}
    if "images" in case:
        out["image"] = [Image.open(file).convert("RGB") for file in case["images"]]
    if "video" in case:
        frames, fps = np.load(case["video"]), case["fps"]
        told = dict(
            fps=fps, duration=len(frames) / fps, total_num_frames=len(frames), frames_indices=list(range(len(frames))),
            video_backend="opencv", do_sample_frames=False,
        )  # fmt: skip
        out["video"] = [(frames, told)]
    return out


def _answer(output: Any) -> dict[str, Any]:
    made = output.outputs[0]
    return {
        "prompt": len(output.prompt_token_ids), "cached": output.num_cached_tokens or 0, "ids": list(made.token_ids),
        "best": [max(p.logprob for p in step.values()) for step in made.logprobs],
    }  # fmt: skip


if __name__ == "__main__":
    os.environ.update(QUIET)
    main(json.loads(Path(sys.argv[1]).read_text()))
