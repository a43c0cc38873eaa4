"""What uses time: reading, sampling, temporal methods, streaming."""
