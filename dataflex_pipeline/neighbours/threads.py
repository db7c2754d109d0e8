"""Matrix products on a CPU, piece by piece on threads of our own.

Between two products of a BLAS with threads of its own, those spin: on a core that another program keeps busy
they burn the time that the product needs (20,000 vectors against each other: 7.0 processor seconds with two
such threads, 4.8 with one, and no sooner done). So every piece is worked on by one thread from beginning to
end, the elementwise steps between its products included, and BLAS and OpenMP have one thread each in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def on_threads(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> Iterator[Result]:
    """Yield what a function makes of each piece, in order; results do not depend on the number of threads.

    Args:
        work: uses nothing that another thread changes. pieces: as many threads are used as OpenMP has
            (OMP_NUM_THREADS, or the cores that the process may run on).
    """
    import faiss
    from threadpoolctl import threadpool_limits

    count = max(1, min(faiss.omp_get_max_threads(), len(pieces)))
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(count, initializer=faiss.omp_set_num_threads, initargs=(1,)) as threads,
    ):
        yield from threads.map(work, pieces)
