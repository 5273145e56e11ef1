"""Files of people's items: JSONL, LaMP, Per-Pcs and RecBole, told apart by what is in them.

``read_people`` gathers everybody; ``iter_parts`` streams and never holds a whole file. A bad row raises a DataError
that names file, line and field, or goes into a file of rejects while reading goes on.
"""

from mta.data.readers.lamp import read_answers
from mta.data.readers.people import describe, describe_splits, iter_parts, read_people
from mta.data.readers.rejects import Rejects
from mta.data.readers.rows import Part

__all__ = ["Part", "Rejects", "describe", "describe_splits", "iter_parts", "read_answers", "read_people"]
