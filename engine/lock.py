"""A file that one process at a time can hold. The system lets go of it when its holder dies."""
import fcntl
import os
import socket
from pathlib import Path

from engine.options import UserError


class Lock:
    """Holds `path`, and says in it who does, until `release`. UserError where another has it.

    On a folder that several machines share it is as good as the file system's locks. Where there
    are none, nothing is held.
    """

    def __init__(self, path: Path, what: str):
        self.file = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(f"{what} is in use by {holder}: wait for it, stop it, or choose "
                            "another --out_dir") from None
        except OSError:  # a file system without locks
            return
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()

    def release(self):
        self.file.close()
