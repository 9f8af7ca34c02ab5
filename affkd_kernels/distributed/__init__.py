"""One loss over the batches of all processes (docs/distributed.md).

Imported when a call has a ``process_group``, or by whoever wants :func:`gather_rows`.
"""

from .losses import evaluate, mean_over_ranks, rows_of_all_ranks
from .shards import gather_rows

__all__ = ["evaluate", "gather_rows", "mean_over_ranks", "rows_of_all_ranks"]
