"""Entry points of other engines. Nothing here is imported by the rest of the package."""
