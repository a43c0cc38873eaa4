"""Methods across frames that choose among cached tokens in decode."""
