"""The state folder's own name: it says in a database which folder holds a job's files, wherever that is mounted."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from service.errors import StateUnwritable

NAME = "home"


def home(state: Path) -> str:
    """Make the folder where it isn't there, and give it a name where it has none. Raises StateUnwritable."""
    path = state / NAME
    mine = state / f".{NAME}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        state.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            mine.write_text(f"home-{secrets.token_hex(12)}\n")
            with suppress(FileExistsError):  # another process was faster: its name holds
                os.link(mine, path)
            mine.unlink()
        return path.read_text().strip()
    except OSError as error:
        raise StateUnwritable(
            f"the state folder {state} can't be written: {error.strerror}; set SAFELIGHT_STATE to one that can"
        ) from error
