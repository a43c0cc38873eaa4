"""Honest measuring: FLOPs by torch's counter, interleaved clock times, peak memory."""
