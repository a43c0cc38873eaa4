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

from tokenreduce.demo.common import WAITING
from tokenreduce.demo.looks import CSS, theme

__all__ = ["build", "launch"]

TITLE = "tokenreduce: fewer tokens, without training"
LEAD = (
    "# Fewer tokens, without training\n"
    "Merge or drop tokens of a vision transformer while it runs, and see what that saves and what it costs."
)
#: Largest upload; what is behind it is looked at again, by kind, before it is decoded.
MOST_UPLOAD = "32mb"
#: Every sweep that waits for its turn takes a thread to say so.
THREADS = 40 + WAITING


def build(store: Any, folder: Path) -> Any:
    """The page as ``gradio.Blocks``. ``folder`` takes the runs of visitors, each in one of its own."""
    import gradio as gr

    from tokenreduce.demo import ask_tab, image_tab, overview, overview_tab, own_tab, trade_tab

    runs, why = overview.fitting(store)
    first = "overview" if runs else "image" if store.images else "ask"
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(300, 1800), fill_width=True) as page:
        gr.Markdown(LEAD)
        with gr.Tabs(selected=first):
            with gr.Tab("Trade-off", id="overview"):
                overview_tab.add(store, runs, why, page)
            if store.images:
                with gr.Tab("Image", id="image") as tab:
                    image_tab.add(store, page.load if first == "image" else tab.select)
            with gr.Tab("Ask", id="ask") as tab:
                ask_tab.add(store, tab)
            with gr.Tab("Measure", id="trade") as tab:
                trade_tab.add(store, page, tab, folder / "measure")
            with gr.Tab("Your model", id="own") as tab:
                own_tab.add(store, page, tab, folder / "own")
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
    page = build(store, root / "runs")
    _, url, public = page.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, show_error=True,
        max_file_size=MOST_UPLOAD, ssr_mode=False, theme=theme(), css=CSS, footer_links=[], enable_monitoring=False,
        max_threads=THREADS,
    )  # fmt: skip
    if wait:
        # Like Ctrl-C, so that the folder is deleted then, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        print(f"tokenreduce demo: {public or url} (Ctrl-C stops it)", flush=True)
        page.block_thread()
    return page, public or url
