"""What every method keeps of the same pictures: looked up with the embedded models, stored as text, drawn for pages.

``python -m tokenreduce.bench.gallery docs/kept.json`` runs the models and stores which token every patch went to; the
site draws that when it is built, with the code of ``tokenreduce show``.
"""

from __future__ import annotations

from tokenreduce.bench.gallery.kept import Kept, Without, read_kept

__all__ = ["Kept", "Without", "read_kept"]
