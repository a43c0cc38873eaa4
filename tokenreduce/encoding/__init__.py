"""Features of many images: a folder, a saved data set or shards through a reduced encoder into Parquet files."""

from tokenreduce.encoding.encode import Encoded, encode
from tokenreduce.encoding.task import Encoding, Features

__all__ = ["Encoded", "Encoding", "Features", "encode"]
