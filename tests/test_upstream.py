"""Patched models in the hands of other libraries: pipelines of transformers, accelerate, peft."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from vlm_folders import save_llava

import tokenreduce as tr
from tokenreduce.core.undo import reducers_of

transformers = pytest.importorskip("transformers")
SPEC = "divprune:keep=0.3+fastv:layer=2,keep=0.5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def model(folder: Path) -> torch.nn.Module:
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture
def inputs(folder: Path) -> dict[str, torch.Tensor]:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return processor(images=picture(), text="USER: <image> what is this ASSISTANT:", return_tensors="pt")


def picture() -> Image.Image:
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def test_a_pipeline_of_images_classifies_as_the_patched_model_does():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, initializer_range=0.5, **sizes)
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    stock = copy.deepcopy(model)
    pipe = transformers.pipeline("image-classification", model=tr.patch(model, "tome:r=3"), image_processor=processor)
    said = {each["label"]: each["score"] for each in pipe(picture(), top_k=5)}
    pixels = processor(picture(), return_tensors="pt")
    with torch.no_grad():
        want, whole = (m(**pixels).logits.softmax(-1)[0].tolist() for m in (model, stock))
    assert [said[config.id2label[i]] for i in range(5)] == pytest.approx(want, abs=1e-6)
    assert want != pytest.approx(whole, abs=1e-4)


def test_a_pipeline_of_images_and_text_generates_as_the_patched_model_does(folder, model, inputs):
    processor = transformers.AutoProcessor.from_pretrained(folder)
    pipe = transformers.pipeline("image-text-to-text", model=tr.patch(model, SPEC), processor=processor)
    text = "USER: <image> what is this ASSISTANT:"
    with tr.record(model, flops=False) as trace:
        (said,) = pipe(images=picture(), text=text, max_new_tokens=5, return_full_text=False, do_sample=False)
    assert {step.method.partition(":")[0] for step in trace.steps} >= {"divprune", "fastv"}
    want = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said["generated_text"].strip() == processor.decode(want, skip_special_tokens=True).strip()


def test_accelerate_prepares_and_offloads_a_patched_model(model, inputs):
    accelerate = pytest.importorskip("accelerate")
    want = logits(tr.patch(model, SPEC), inputs)
    prepared = accelerate.Accelerator(cpu=True).prepare(model)
    assert torch.equal(logits(prepared, inputs), want)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    torch.testing.assert_close(logits(offloaded, inputs), want)


def test_what_accelerate_has_dispatched_is_refused_by_name(model):
    """Its hooks stand in front of a layer's own forward, so that they would run behind ours."""
    accelerate = pytest.importorskip("accelerate")
    dispatched = accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match=r"accelerate's dispatch\); call tr.patch before dispatching"):
        tr.patch(dispatched, SPEC)
    assert not reducers_of(dispatched)


def test_peft_adapters_work_whichever_comes_first(model, inputs):
    peft = pytest.importorskip("peft")

    def adapted(one: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(one, config).eval()

    stock = adapted(copy.deepcopy(model))
    late = tr.patch(adapted(copy.deepcopy(model)), SPEC)
    early = adapted(tr.patch(copy.deepcopy(model), SPEC))
    assert reducers_of(late) == reducers_of(early) == tr.parse(SPEC)
    whole, got = logits(stock, inputs), logits(late, inputs)
    assert torch.equal(got, logits(early, inputs))
    assert not torch.allclose(got, whole)
    late(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {n: p.grad for n, p in late.named_parameters() if "lora_" in n}
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in grads.values()) > len(grads) / 2
    assert torch.equal(logits(tr.unpatch(late), inputs), whole)
