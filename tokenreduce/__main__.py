"""``python -m tokenreduce`` is the same as ``tokenreduce``."""

from __future__ import annotations

from tokenreduce.cli import main

if __name__ == "__main__":
    main()
