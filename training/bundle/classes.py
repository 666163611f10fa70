"""Which classes a new version has: one rule for the service's door, the check of a data set, and the run itself."""

import unicodedata
from collections.abc import Sequence

from training import SafelightError

BUILT_IN = {  # the data sets that go by name, not by path
    "mnist": tuple("0123456789"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}


class NameTaken(SafelightError):
    """The name is that of a model that tells other classes apart."""


def folded(label: str) -> str:
    """What names of one class have in common: neither case nor Unicode's form makes another class."""
    return unicodedata.normalize("NFC", label).casefold()


def known(found: Sequence[str], base: Sequence[str]) -> dict[str, str]:
    """Those of a data set's classes that the base has too, and what it calls them."""
    theirs = {folded(label): label for label in base}
    return {label: theirs[folded(label)] for label in found if folded(label) in theirs}


def settled(
    name: str, base: Sequence[str], found: Sequence[str], *, keep: bool, namesakes: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    """The classes of a new version of the model `name`, in index order.

    The base's where the pictures bring no other; else the pictures', after the base's if those are to be kept. A model
    keeps its classes from version to version: those of its `namesakes`, whose first has the last word on spelling and
    order. Raises NameTaken where they are others.
    """
    same = known(found, base)
    new = [label for label in found if label not in same]
    classes = (*base, *new) if keep or not new else tuple(same.get(label, label) for label in found)
    for theirs in namesakes:
        if set(map(folded, theirs)) != set(map(folded, classes)):
            raise NameTaken(
                f"model {name} has the classes {_listed(theirs)}; the new version would have {_listed(classes)}: "
                "give it another `name`"
            )
    return tuple(namesakes[0]) if namesakes else classes


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(label[:40] for label in labels[:10])
    return shown + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
