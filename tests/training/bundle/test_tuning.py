import pytest

from training.bundle.tuning import Tuning, TuningInvalid


def test_left_alone_everything_follows_from_the_data() -> None:
    assert Tuning.parse({}) == Tuning.from_words([]) == Tuning()


def test_words_become_values() -> None:
    tuning = Tuning.from_words(["epochs=2.5", "depth=head", "flip=false", "batch_size=16"])
    assert tuning == Tuning(epochs=2.5, depth="head", flip=False, batch_size=16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"speed": 3},
            "fine-tuning has no setting 'speed'; it has depth, epochs, batch_size, learning_rate, shift, flip",
        ),
        ({"epochs": 0}, "epochs=0: Input should be greater than 0"),
        ({"epochs": 1e9}, "epochs=1000000000.0: Input should be less than or equal to 1000"),
        ({"epochs": float("nan")}, "epochs=nan: Input should be a finite number"),
        (
            {"batch_size": "many"},
            "batch_size='many': Input should be a valid integer, unable to parse string as an integer",
        ),
        ({"depth": "deep"}, "depth='deep': Input should be 'auto', 'head' or 'full'"),
    ],
)
def test_what_it_cannot_be_is_said(values: dict[str, object], message: str) -> None:
    with pytest.raises(TuningInvalid) as refusal:
        Tuning.parse(values)
    assert str(refusal.value).startswith(message)
    assert refusal.value.facts == {"setting": next(iter(values))}


def test_a_word_without_a_value_is_refused() -> None:
    with pytest.raises(TuningInvalid, match=r"^'epochs' isn't a setting; write key=value, for example epochs=3$"):
        Tuning.from_words(["epochs"])
