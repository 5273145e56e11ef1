"""Readers of people's items from JSONL, CSV, Parquet, and formats of other packages.

``read_people`` returns all people; ``iter_parts`` streams rows, and holds only the text of JSON arrays in memory. A bad
row raises a DataError that names file, line, and field, or is written to a file of rejects while reading continues.
"""

from mta.data.readers.people import iter_parts, read_people
from mta.data.readers.rejects import Rejects
from mta.data.readers.rows import RecordPart

__all__ = ["RecordPart", "Rejects", "iter_parts", "read_people"]
