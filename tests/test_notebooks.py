"""Every notebook runs from top to bottom on the embedded models, offline, and holds what its text says."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenreduce.zoo import weights

FOLDER = Path(__file__).parents[1] / "notebooks"

#: What is run behind the last cell of each, in the same kernel.
CHECKS = {
    "01_quickstart": """
assert undone and trace.tokens and len(layers) == seen.depth == 6
best = results.set_index("spec")["top-1, %"]
assert len(results) == 13 and results["FLOPs, %"].between(30, 100).all()
assert best[""] > 95 and best["tome:r=[11,9,8,6,4,3]"] > best["random:r=[11,9,8,6,4,3]"]
assert less.flops < 0.7 * whole.flops and not tr.describe(model).active
""",
    "02_vlm": """
assert len(table) == 12 and (table["196 tokens"] == table["right answer"]).mean() > 0.7
assert [site.after for site in result.sites] == [48, 24] and result.reduced.encoder < result.stock.encoder
assert together == alone and len(pictures) == 2 and pictures[0].tobytes() != pictures[1].tobytes()
assert accuracy.accuracy["unreduced"] > 80
assert accuracy.accuracy["fastervlm:keep=20"] > accuracy.accuracy["random@projector:keep=20"]
""",
    "03_video": """
assert len(film) == 8 and abs(film.frames.astype(int) - clips[0].frames).mean() < 8
assert len(table) == 5 and (table["392 tokens"] == table["right answer"]).sum() >= 3
assert len(views) == 8 and result.reduced.layers[0] == 98
assert accuracy.accuracy["unreduced"] > accuracy.accuracy["uniform-frames:keep=0.25"]
assert (stream["tokens held"] <= stream["at most"]).all() and pyramid.seen == 64
assert begin == 4 * wanted and len(seen.x) == 64
""",
    "04_add_a_method": """
assert plan.sources()[0].tolist() == [0, 1, -1, 2, -1, -1, 3]
assert accuracy["unusual:keep=0.3"] > accuracy["random:keep=0.3"]
assert not run.errors and sum(row["method"] == "unusual" for row in run.rows) == 2 and len(run.rows) == 11
assert "unusual" in done.stdout and "Least like the average patch" in " ".join(done.stdout.split())
""",
}
#: What the cells import, besides the package itself.
NEEDS = {
    "01_quickstart": ("timm", "mlxtend", "pandas", "matplotlib"),
    "02_vlm": ("timm", "transformers", "pandas"),
    "03_video": ("timm", "transformers", "pandas", "av"),
    "04_add_a_method": ("timm", "mlxtend", "matplotlib"),
}


def read(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


def test_every_notebook_is_tested() -> None:
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_stored_without_outputs(name: str) -> None:
    code = [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]
    assert code
    for cell in code:
        clean = not cell["outputs"] and cell["execution_count"] is None
        assert clean, f"clear it: jupyter nbconvert --clear-output --inplace notebooks/{name}.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_runs_and_holds(name: str, tmp_path: Path) -> None:
    for library in ("nbclient", "nbformat", "ipykernel", *NEEDS[name]):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed: pip install 'tokenreduce[dev]'")
    if "transformers" in NEEDS[name] and "world-llava" not in weights.stored():
        pytest.skip("the weights of world-llava are not in the package yet")
    import nbformat
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from nbclient import NotebookClient

    class Here(KernelSpecManager):
        """This interpreter, whatever kernels the user has registered."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[name]))
    work, scratch = tmp_path / "work", tmp_path / "scratch"
    work.mkdir(), scratch.mkdir()
    client = NotebookClient(
        notebook, timeout=600, km=AsyncKernelManager(kernel_spec_manager=Here()),
        resources={"metadata": {"path": str(work)}},
    )  # fmt: skip
    # Nothing is looked up on a network, and temporary files go with the test.
    # A manager of our own is not shut down by itself.
    client.execute(env={**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)}, cleanup_kc=True)
    assert not list(work.iterdir()), "the notebook left files where it was run"
