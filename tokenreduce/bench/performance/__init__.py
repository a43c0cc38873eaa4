"""The clock measurements of docs/performance.md, one command each."""
