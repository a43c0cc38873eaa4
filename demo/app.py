"""The page itself: tabs, looks, and the server with its limits."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["build", "launch"]

TITLE = "tokenreduce: fewer tokens, without training"
LEAD = (
    "# Fewer tokens, without training\n"
    "Merge or drop tokens of a vision transformer while it runs, and see what that saves and what it costs."
)
CSS = """
.message p { color: #b00020; font-weight: 600; margin: 0; }
.hint p { color: #666; font-size: .85rem; margin: 0; }
footer { display: none !important; }
.gradio-container { max-width: 1320px !important; }
.wide { overflow-x: auto; }
.answers td, .answers th { padding: 4px 10px !important; text-align: left; }
.answers td:first-child { min-width: 11rem; }
.answers tr.r0 td { font-weight: 600; }
.small { color: #666; font-size: .85rem; }
.gallery-examples .grid-wrap { overflow-x: hidden; }
.gallery-examples .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
.facts td, .facts th { word-break: normal; overflow-wrap: normal; }
table { font-variant-numeric: tabular-nums; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  .facts td, .facts th { padding: 4px 5px !important; font-size: .8rem; }
  .answers td, .answers th { padding: 3px 5px !important; font-size: .8rem; }
  .answers td:first-child { min-width: 5rem; }
}
"""
#: Largest upload; what is behind it is looked at again, by kind, before it is decoded.
MOST_UPLOAD = "32mb"
#: Requests that wait; later visitors are told to come back.
WAITING = 32


def build(store: Any, folder: Path) -> Any:
    """The page as ``gradio.Blocks``. ``folder`` takes the runs of visitors, each in one of its own."""
    import gradio as gr

    from tokenreduce.demo import ask, image, trade

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(300, 1800), fill_width=True) as page:
        gr.Markdown(LEAD)
        with gr.Tabs():
            if store.images:
                with gr.Tab("Image", id="image"):
                    image.add(store, page)
            with gr.Tab("Ask", id="ask") as tab:
                ask.add(store, tab)
            with gr.Tab("Trade-off", id="trade"):
                trade.add(store, page, folder)
    page.queue(max_size=WAITING, default_concurrency_limit=4, api_open=False)
    return page


def launch(
    store: Any, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False, wait: bool = True
) -> Any:
    """Serve the page and return ``(page, url)``; with ``wait`` only when it was stopped.

    Uploads and runs of visitors lie in one temporary folder, which is deleted at the end. Raises ``OSError`` when no
    port is free (or ``port`` is not).
    """
    root = Path(tempfile.mkdtemp(prefix="tokenreduce-demo-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(root / "files")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    page = build(store, root / "runs")
    plain = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=plain, font_mono=["ui-monospace", "monospace"])  # no fonts from elsewhere
    _, url, public = page.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, show_error=True,
        max_file_size=MOST_UPLOAD, ssr_mode=False, theme=theme, css=CSS, footer_links=[], enable_monitoring=False,
    )  # fmt: skip
    if wait:
        # Like Ctrl-C, so that the folder is deleted then, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        print(f"tokenreduce demo: {public or url} (Ctrl-C stops it)", flush=True)
        page.block_thread()
    return page, public or url
