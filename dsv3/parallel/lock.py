"""One process at a time writes into a directory."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv3.config import UserError

LOCK = ".lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.ENOSYS}


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of an existing `directory`, the file `.lock` in it, which says who holds it.

    Raises `UserError` at once where another process holds it, or another `locked` of this one. The operating system
    releases the lock of a process that ends, however it ends, so nothing is left to clean up. A file system that knows
    no locks is used without one, with a warning.
    """
    path = directory / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise UserError(f"{directory} is being written by {owner}; wait until it ends, or give another "
                            "directory") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            logging.warning("the file system of %s knows no locks (%s); nothing keeps a second process from writing "
                            "there", directory, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
