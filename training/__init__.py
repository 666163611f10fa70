"""The offline package: data sets, networks, training, evaluation, export.

It imports nothing of `service`. The service, in turn, may import `training.bundle` (what a model file is),
`training.events` (what a run prints) and `training.devices` (what this machine is), and nothing else of it.
"""

__version__ = "0.1.0"


class SafelightError(Exception):
    """Something that the person who asked can mend. The message is for them: what is wrong, the limit that was hit,
    and what to do. `facts` say the same to programs."""

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts
