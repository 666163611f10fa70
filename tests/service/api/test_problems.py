from pathlib import Path

import service.errors
from service.api import problems
from training import SafelightError
from training.bundle import images, store
from training.bundle.classes import NameTaken
from training.bundle.tuning import TuningInvalid

DOCS = Path(__file__).parents[3] / "docs"


def descendants(kind: type[SafelightError]) -> set[type[SafelightError]]:
    return {kind} | {found for child in kind.__subclasses__() for found in descendants(child)}


def test_every_error_that_a_request_can_meet_has_a_status() -> None:
    raised = descendants(service.errors.ServiceError) | descendants(images.ImageRejected)
    raised |= {store.NameInvalid, store.ArtifactsUnwritable, NameTaken, TuningInvalid}
    abstract = {service.errors.ServiceError, images.ImageRejected}
    assert set(problems.PROBLEMS) == raised - abstract


def test_codes_are_distinct_and_statuses_are_errors() -> None:
    kinds = [*problems.PROBLEMS.values(), *problems.HTTP.values(), problems.INTERNAL, problems.INVALID_PARAMETER]
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(400 <= kind.status < 600 for kind in kinds)


def test_a_new_kind_of_error_falls_back_to_its_parents_status() -> None:
    class Sideways(images.ImageCorrupt):
        pass

    assert problems.kind_of(Sideways("x")).code == "image_corrupt"
    assert problems.kind_of(SafelightError("x")) == problems.INTERNAL


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = {
        line.split()[1] for line in (service.errors.__doc__ or "").splitlines() if line.strip().startswith(("*", "+"))
    }
    assert drawn == {kind.__name__ for kind in descendants(service.errors.ServiceError)}
