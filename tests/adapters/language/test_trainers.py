"""Trainers on a model that drops columns of the prompt: each gets the number that the model stands for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_folders import save_qwen
from vlms import IMAGE, VIDEO, VLMS, prompts
from vlms_masked import close

import tokenreduce as tr

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow
F = torch.nn.functional
SPECS = ("fastv:layer=2,keep=0.5", "divprune:keep=4", "tome:r=2", "divprune:keep=0.5+fastv:layer=2,keep=0.5")


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2,
        "report_to": [], "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 1,
        "learning_rate": 1e-3, "bf16": False, **more,
    }  # fmt: skip


def logged(trainer, name="loss"):
    return [step[name] for step in trainer.state.log_history if name in step]


def rows_of(name):
    inputs = prompts(VLMS[name], ((9, "i"), (6, "i"), (7, "i"), (8, "i")))
    hidden = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE)
    inputs["labels"] = inputs["input_ids"].masked_fill(hidden, -100)
    return [{k: v[i] for k, v in inputs.items()} for i in range(4)]


#: What else the models return, which some releases cannot gather in an evaluation.
OTHERS = ["image_outputs", "image_hidden_states", "cache", "past_key_values"]


def train(name, spec, folder, **more):
    """``(trainer, evaluated, predictions)`` of transformers' own trainer."""
    from transformers import Trainer, TrainingArguments

    model, seen, rows = copy.deepcopy(VLMS[name].model), [], rows_of(name)
    if spec is not None:
        tr.patch(model, spec)

    def metrics(found):
        right = found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:]
        seen.append(found)
        return {"right": float(right[found.label_ids[:, 1:] != -100].mean())}

    given = {k: more.pop(k) for k in ("compute_loss_func",) if k in more}
    trainer = Trainer(
        model, TrainingArguments(**settings(folder, remove_unused_columns=False, **more)), train_dataset=rows,
        eval_dataset=rows, compute_metrics=metrics, **given,
    )  # fmt: skip
    before = trainer.evaluate(ignore_keys=OTHERS)
    predictions = seen[0].predictions
    trainer.train()
    return trainer, before, predictions


def smoothed(logits, labels, shift):
    """Label smoothing of 0.1 by its definition; the library counts shifted labels even where it does not shift."""
    many = (labels[:, 1:] != -100).sum()
    logits, labels = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    flat, target = logits.flatten(0, 1).log_softmax(-1), labels.flatten()
    counts = target != -100
    nll, every = -flat[counts, target[counts]].sum() / many, -flat[counts].mean(-1).sum() / many
    return 0.9 * nll + 0.1 * every


def stacked(rows, which=slice(None)):
    return {k: torch.stack([r[k] for r in rows[which]]) for k in rows[0]}


@pytest.mark.parametrize("name", ["llava", "paligemma", "gemma3", "internvl"])
def test_transformers_trainer(name, tmp_path):
    kinds = (
        {}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    )  # fmt: skip
    rows, specs = rows_of(name), SPECS if name == "llava" else SPECS[-1:]
    losses = {}
    for i, more in enumerate(kinds):
        stock, _, _ = train(name, None, tmp_path, **more)
        same, _, _ = train(name, "divprune:keep=1.0", tmp_path, **more)
        assert logged(same) == logged(stock)
        for a, b in zip(same.model.parameters(), stock.model.parameters(), strict=True):
            assert torch.equal(a, b)
        for spec in specs:
            trainer, evaluated, predictions = train(name, spec, tmp_path, **more)
            losses[spec, i] = torch.tensor(logged(trainer))
            model = tr.patch(copy.deepcopy(VLMS[name].model), spec)
            halves = [stacked(rows, slice(0, 2)), stacked(rows, slice(2, 4))]
            with torch.no_grad():
                out = [model(**half) for half in halves]
            close(torch.tensor(predictions), torch.cat([o.logits for o in out]))
            if "label_smoothing_factor" in more:  # which the library shifts for Gemma alone
                want = [smoothed(o.logits, h["labels"], name == "gemma3") for o, h in zip(out, halves, strict=True)]
            else:
                want = [o.loss for o in out]
            close(torch.tensor(evaluated["eval_loss"]), torch.stack(want).mean())
            assert "eval_right" in evaluated
    for spec in specs:
        close(losses[spec, 2], losses[spec, 0])
        close(losses[spec, 3], losses[spec, 0])
        assert float((losses[spec, 1] - losses[spec, 0]).abs().max()) > 1e-3


def test_a_loss_of_the_users_own(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        total = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch

    for spec in SPECS:
        plain, before, _ = train("llava", spec, tmp_path)
        mine, own, _ = train("llava", spec, tmp_path, compute_loss_func=loss)
        close(torch.tensor(logged(mine)), torch.tensor(logged(plain)))
        close(torch.tensor(own["eval_loss"]), torch.tensor(before["eval_loss"]))


class Qwen:
    """A small Qwen2.5-VL in a folder, as TRL loads it, and data with a picture each."""

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset
        from transformers import AutoProcessor

        self.folder = save_qwen(folder / "qwen")
        self.processor = AutoProcessor.from_pretrained(self.folder)
        g = np.random.default_rng(0)
        answers = [("a red cat", "two dog there"), ("blue", "a man with hat"), ("no dog", "yes"), ("a cup", "a spoon")]
        ask = [{"role": "user", "content": "what is in this image ?"}]

        def said(text: str) -> list[dict[str, str]]:
            return [{"role": "assistant", "content": text}]

        pictures = [Image.fromarray(g.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in answers]
        both = list(zip(pictures, answers, strict=True))
        self.sft = Dataset.from_list([{"images": [p], "prompt": ask, "completion": said(a)} for p, (a, _) in both])
        self.chat = Dataset.from_list([{"images": [p], "messages": ask + said(a)} for p, (a, _) in both])
        self.dpo = Dataset.from_list(
            [{"images": [p], "prompt": ask, "chosen": said(a), "rejected": said(b)} for p, (a, b) in both]
        )
        self.grpo = Dataset.from_list([{"image": p, "prompt": ask} for p in pictures])

    def model(self, spec: str | None, **more: Any) -> Any:
        from transformers import Qwen2_5_VLForConditionalGeneration

        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.folder)
        return model if spec is None else tr.patch(model, spec, **more)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    pytest.importorskip("trl")
    return Qwen(tmp_path_factory.mktemp("trl"))


def completion(labels, logits):
    """(B,) sum of log-probabilities of the labelled tokens."""
    found = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    return found.masked_fill(labels[:, 1:] == -100, 0).sum(1)


def batch_of(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def test_trl_sft(qwen, tmp_path):
    from trl import SFTConfig, SFTTrainer

    def make(spec, data, patch=None, given=None, **more):
        return SFTTrainer(
            model=qwen.model(spec, **(patch or {})), args=SFTConfig(**settings(tmp_path, max_length=None, **more)),
            train_dataset=data, eval_dataset=data, processing_class=qwen.processor, **(given or {}),
        )  # fmt: skip

    def run(*args, **more):
        trainer = make(*args, **more)
        trainer.train()
        return logged(trainer)

    for data in (qwen.sft, qwen.chat):
        assert run("divprune:keep=1.0", data) == run(None, data)
        for spec in SPECS:
            trainer = make(spec, data)
            inputs = batch_of(trainer)
            with torch.no_grad():
                want = qwen.model(spec)(**{k: v for k, v in inputs.items()}).loss
                got = trainer.compute_loss(trainer.model, dict(inputs))
            close(got, want)
    for spec in SPECS:
        for training, patch in ((True, None), (False, {"logits": "caller"})):
            trainer = make(spec, qwen.sft, patch, label_smoothing_factor=0.1)
            trainer.model.train(training)
            inputs = batch_of(trainer)
            with torch.no_grad():
                whole = qwen.model(spec)(**inputs)
                got = trainer.compute_loss(trainer.model, dict(inputs))
            close(got, smoothed(whole.logits, inputs["labels"], shift=True))

        def metrics(found):
            logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
            right = logits[:, :-1].argmax(-1) == found.label_ids[:, 1:]
            return {"right": float(right[found.label_ids[:, 1:] != -100].sum())}

        trainer = make(spec, qwen.sft, {"logits": "caller"}, {"compute_metrics": metrics})
        right = 0
        for inputs in trainer.get_eval_dataloader():
            with torch.no_grad():
                found = trainer.model(**inputs).logits[:, :-1].argmax(-1)
            right += int((found == inputs["labels"][:, 1:]).sum())
        assert trainer.evaluate()["eval_right"] == right


def test_trl_dpo(qwen, tmp_path):
    from trl import DPOConfig, DPOTrainer

    def make(spec, ref):
        return DPOTrainer(
            model=qwen.model(spec), ref_model=qwen.model(ref), processing_class=qwen.processor,
            args=DPOConfig(**settings(tmp_path, max_length=None)), train_dataset=qwen.dpo,
        )  # fmt: skip

    def run(spec):
        trainer = make(spec, spec)
        trainer.train()
        return [logged(trainer, name) for name in ("loss", "logps/chosen", "rewards/margins")]

    assert run("divprune:keep=1.0") == run(None)
    for spec in SPECS:
        trainer = make(spec, spec)
        inputs = batch_of(trainer)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {k: v for k, v in inputs.items() if k != "completion_mask"}
        with torch.no_grad():
            want = completion(labels, qwen.model(spec)(**given, labels=labels).logits)
        losses, chosen, margins = run(spec)
        assert losses[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference are the same at first"
        assert margins[0] == pytest.approx(0.0, abs=1e-4)
        assert chosen[0] == pytest.approx(float(want[:2].mean()), rel=1e-3)


def test_trl_grpo(qwen, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    def make(spec):
        # A model of random weights might also say that there is an image.
        said = {"suppress_tokens": [IMAGE, VIDEO]}
        more = dict(max_completion_length=6, num_generations=2, beta=0.1, generation_kwargs=said)
        trainer = GRPOTrainer(
            model=qwen.model(spec), processing_class=qwen.processor, args=GRPOConfig(**settings(tmp_path, **more)),
            train_dataset=qwen.grpo, reward_funcs=lambda completions, **k: [float(i) for i in range(len(completions))],
        )  # fmt: skip
        if spec is not None:
            tr.patch(trainer.ref_model, spec)
        return trainer

    def run(spec):
        trainer = make(spec)
        trainer.train()
        return [logged(trainer, name) for name in ("loss", "kl", "reward")]

    assert run("divprune:keep=1.0") == run(None)
    for spec in SPECS:
        _, kl, _ = run(spec)
        assert kl[0] == pytest.approx(0.0, abs=1e-5)
        assert kl[1] > 0
        trainer = make(spec)
        inputs = batch_of(trainer)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        n = inputs["completion_ids"].shape[1]
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        given = {k: inputs[k] for k in names if k in inputs}
        with torch.no_grad():
            got = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, n, **given)[0]
            plain = {k: v for k, v in given.items() if k != "num_images"}
            logits = qwen.model(spec)(input_ids=ids, attention_mask=mask, **plain, logits_to_keep=n + 1).logits
        want = logits[:, :-1].log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
        close(got * inputs["completion_mask"], want * inputs["completion_mask"])


def test_trl_heads_behind_wrappers_that_pass_by_hooks(qwen, tmp_path):
    """TRL gives the model a forward of its own, and PEFT calls that one directly."""
    from trl import SFTConfig, SFTTrainer

    for spec in SPECS:
        trainer = SFTTrainer(
            model=qwen.model(spec), args=SFTConfig(**settings(tmp_path, max_length=None)), train_dataset=qwen.sft,
            processing_class=qwen.processor,
        )  # fmt: skip
        inputs = batch_of(trainer)
        model = trainer.model
        for mode in (True, False):
            model.train(mode)
            with torch.no_grad():
                want = model(**inputs, fused_lm_head=True)
                got = model.forward(**inputs, fused_lm_head=True)
            assert torch.equal(got.log_probs, want.log_probs)
            assert torch.equal(got.loss, want.loss)
