"""A disk that is full, as far as this process can tell: no file may grow beyond some bytes."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(largest_file=500):
    """Writes that make a file longer fail, with EFBIG where a full disk says ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
