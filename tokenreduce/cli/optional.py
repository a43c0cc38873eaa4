"""Which extra brings a library that is not installed."""

from __future__ import annotations

__all__ = ["EXTRAS", "missing"]

#: By the name under which a library is imported, the extra to install.
EXTRAS = {
    "timm": "timm", "torchvision": "timm", "open_clip": "open_clip", "transformers": "hf", "tokenizers": "hf",
    "huggingface_hub": "hf", "datasets": "data", "webdataset": "data", "braceexpand": "data", "pyarrow": "data",
    "av": "video", "decord": "video", "mlxtend": "bench", "pandas": "bench", "matplotlib": "bench", "plotly": "bench",
    "gradio": "demo", "httpx": "server", "onnxscript": "export", "onnxruntime": "export",
    "ray": "ray",
}  # fmt: skip


def missing(error: BaseException) -> str | None:
    """What to say where ``error`` is Python's own that an optional library cannot be found; None for other errors."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    library = error.name.partition(".")[0]
    extra = EXTRAS.get(library)
    if extra is None or error.name.startswith("tokenreduce"):
        return None
    return f"this needs {library}, which is not installed: pip install 'tokenreduce[{extra}]'"
