"""The Gradio page: look at the trade on the embedded models or on your own (``tokenreduce demo``)."""
