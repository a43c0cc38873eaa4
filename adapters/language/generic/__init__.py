"""Image/video language models that no row of a table describes, found by their structure.

What is needed is a class of transformers with image or video features and ids of placeholders. Columns go at the call
of the model around tower and language model, so that it makes masks, multi-axis positions, per-layer inputs, DeepStack
rows and routing ids itself, of what is left; nothing here knows a family by name.
"""
