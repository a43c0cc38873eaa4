"""A patched vision encoder as a file for another runtime, checked against what it is made of, and timed."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.common.files import cannot_write, make_folder
from tokenreduce.common.words import counted
from tokenreduce.core.labels import label_of
from tokenreduce.core.reducer import Reducer
from tokenreduce.core.trace import record
from tokenreduce.measure.timing import Speedup, interleaved
from tokenreduce.patching import patched

__all__ = ["FORMATS", "Checked", "Exported", "ExportDiffersError", "export", "needs", "runner"]

#: Formats and the ends of their files.
FORMATS = {"onnx": ".onnx", "pt2": ".pt2"}
#: What outputs may differ by, as a share of the largest output of the batch.
TOLERANCE = 1e-3
#: Images of the example that is traced; one alone might fix the batch.
EXAMPLE = 2
#: (B,C,H,W) to (B,...).
Runs = Callable[[Tensor], Tensor]


class ExportDiffersError(ValueError):
    """The exported program says something else than the model."""


@dataclass(frozen=True)
class Checked:
    """How far a program is from the model: the largest difference over ``images`` images, of outputs up to ``scale``,
    in batches of ``batches``."""

    difference: float
    scale: float
    images: int
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Exported:
    """A file on the disk (of ``bytes`` with what lies beside it), how exact it is, and its speed against the stock
    export, None where nothing was timed; ``stock_s`` and ``seconds`` are medians of one batch of ``batch``."""

    path: Path
    format: str
    spec: str
    bytes: int
    checked: Checked
    batch: int
    notes: tuple[str, ...] = ()
    stock_s: float | None = None
    seconds: float | None = None
    speedup: Speedup | None = None


class _Program(nn.Module):
    """``forward(model, x)`` as a module."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, images: Tensor) -> Tensor:
        return self._forward(self.model, images)


def needs(form: str) -> None:
    """Raises ``ValueError`` for a format that is none of :data:`FORMATS`, ``ImportError`` with the extra for what is
    not installed."""
    if form not in FORMATS:
        raise ValueError(f"--format is one of {', '.join(FORMATS)}, not {form!r}")
    for library in ("onnxscript", "onnxruntime") if form == "onnx" else ():
        try:
            import_module(library)
        except ImportError as error:
            raise ImportError(f"{library} is not installed: pip install 'tokenreduce[export]'") from error


@torch.no_grad()
def export(
    model: nn.Module,
    reducers: Sequence[Reducer],
    images: Tensor,
    path: str | Path,
    *,
    form: str = "onnx",
    forward: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
    repeats: int = 10,
) -> Exported:
    """Write ``model`` with ``reducers`` as a program that takes batches of any size.

    Args:
        model: an encoder in eval mode on the CPU, not patched; it is as before afterwards.
        reducers: () exports the stock model.
        images: (B,C,H,W), at least two, real ones, on which the program is compared with the model in batches of all,
            of one and of the rest, and timed as one batch. Height and width are constants of the program.
        path: an earlier file there is replaced only by one that passed.
        form: ``onnx`` (run by onnxruntime) or ``pt2`` (``torch.export``).
        forward: ``forward(model, x)`` gives the tensor that the program returns.
        repeats: timed rounds of the program and of the stock model's, interleaved; 0 leaves the clock out.

    Raises :class:`ExportDiffersError` where outputs differ, ``ValueError`` for a model that cannot be exported, too few
    images or another form, ``ImportError`` for a missing library, ``OSError`` where nothing can be written.
    """
    needs(form)
    if len(images) < EXAMPLE:
        raise ValueError(f"give at least {EXAMPLE} images, not {len(images)}: one alone might fix the batch")
    path = Path(path)
    make_folder(path.parent, "choose another place with --out")
    program = _Program(model, forward).eval()
    notes: list[str] = []
    with _beside(path) as folder:
        file = folder / path.name
        with patched(model, *reducers) if reducers else nullcontext():
            notes += _notes(model, program, images) if reducers else []
            _write(program, images[:EXAMPLE], file, form, label_of(reducers))
            run = runner(file, form)
            checked = _check(run, program, images)
        times = {}
        if repeats:
            stock = folder / f"stock{FORMATS[form]}"
            _write(program, images[:EXAMPLE], stock, form, "")
            reference = runner(stock, form)
            _check(reference, program, images)
            times = interleaved({"stock": lambda: reference(images), "this": lambda: run(images)}, repeats, warmup=2)
            for extra in folder.glob(f"stock{FORMATS[form]}*"):
                extra.unlink()
        size = sum(f.stat().st_size for f in folder.iterdir())
    if not times:
        return Exported(path, form, label_of(reducers), size, checked, len(images), tuple(notes))
    speedup = times["stock"].against(times["this"])
    stock_s = times["stock"].median
    return Exported(
        path, form, label_of(reducers), size, checked, len(images), tuple(notes), stock_s,
        speedup.after(stock_s), speedup,
    )  # fmt: skip


def runner(path: Path, form: str) -> Runs:
    """The program in ``path`` as a function (B,C,H,W) to its output, on as many threads as torch has."""
    if form == "pt2":
        module = torch.export.load(path).module()
        return lambda x: module(x)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _write(program: nn.Module, example: Tensor, file: Path, form: str, spec: str) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            if form == "pt2":
                made: Any = torch.export.export(program, (example,), dynamic_shapes=shapes)
            else:
                made = torch.onnx.export(
                    program, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False,
                    input_names=["images"], output_names=["output"],
                )  # fmt: skip
    except Exception as error:  # whatever a model's own code makes the exporter raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"with {spec}" if spec else "without reduction"
        raise ValueError(f"the model {what} cannot be exported to {form}: {first}") from error
    if form == "pt2":
        torch.export.save(made, file, extra_files={"tokenreduce": spec})
    else:
        made.model.metadata_props["tokenreduce"] = spec
        made.save(file)


def _check(run: Runs, program: nn.Module, images: Tensor) -> Checked:
    parts = [images, images[:1], images[1:]]
    worst = scale = 0.0
    bad: set[int] = set()
    for start, x in zip((0, 0, 1), parts, strict=True):
        mine, theirs = program(x), run(x)
        if mine.shape != theirs.shape:
            raise ExportDiffersError(f"the program returns {tuple(theirs.shape)}, the model {tuple(mine.shape)}")
        by_image = (mine - theirs).abs().flatten(1).amax(1)
        largest = float(mine.abs().max())
        worst, scale = max(worst, float(by_image.max())), max(scale, largest)
        bad |= {start + int(i) for i in (~(by_image <= TOLERANCE * largest)).nonzero().flatten()}
    if bad:
        raise ExportDiffersError(
            f"{len(bad)} of {counted(len(images), 'image')} come out otherwise than from the model, by up to "
            f"{worst:.3g} where outputs go to {scale:.3g}; nothing was written. Scores that nearly tie may be ranked "
            "otherwise by another runtime (docs/export.md)"
        )
    return Checked(worst, scale, len(images), tuple(dict.fromkeys(len(x) for x in parts)))


def _notes(model: nn.Module, program: nn.Module, images: Tensor) -> list[str]:
    """What the traced model has to say, and whether the number of its tokens is fixed."""
    with record(model, flops=False) as trace:
        program(images[:EXAMPLE])
    notes = list(dict.fromkeys(trace.notes))
    if any(plan.validity() is not None for plan in trace.plans):
        notes.append(
            "the method keeps as many tokens as an image asks for: the program has the largest number of slots and "
            "masks the empty ones, so that outputs are the same and the saving is that of the largest number"
        )
    return notes


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` whose files (weights of large models lie in one of their own) take their places when the
    block ends well, ``path`` itself last; otherwise nothing is left behind."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=path.parent))
    except OSError as error:
        raise cannot_write(path, error, "choose another place with --out") from error
    try:
        yield folder
        for file in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise cannot_write(path, error, "choose another place with --out") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
