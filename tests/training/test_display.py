"""What a person sees of a run."""

import io

from rich.console import Console

from training import events
from training.display import Display

STARTED = events.Started(
    recipe="tiny", dataset="squares", seed=3, step=0, steps=20, device="cpu (2 threads)", precision="float32"
)
PROGRESS = events.Progress(
    step=10, steps=20, epoch=0.5, loss=0.25, accuracy=0.9, images_per_second=1234, seconds_left=65
)
EPOCH = events.Epoch(
    epoch=1, step=20, train_loss=0.5, train_accuracy=0.9, holdout_loss=0.4, holdout_accuracy=0.95, seconds=12
)


def shown(*told: events.Event, terminal: bool) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=200, color_system=None)
    with Display(console) as display:
        for event in told:
            display(event)
        display._progress.refresh()
    return screen.getvalue()


def test_the_bar_has_loss_accuracy_and_the_time_left() -> None:
    bar = shown(STARTED, PROGRESS, terminal=True)
    assert "tiny" in bar
    assert "10/20 loss 0.250  train 90.00%  1,234 images/s  0:01:05 left" in bar


def test_the_bar_goes_on_with_the_last_hold_out() -> None:
    assert "train 90.00%  hold-out 95.00%  1,234 images/s" in shown(STARTED, EPOCH, PROGRESS, terminal=True)


def test_the_bar_shows_what_is_done_beside_training() -> None:
    heads = events.Phase(phase="heads", step=7, steps=9, seconds_left=2.5)
    bar = shown(STARTED, PROGRESS, heads, terminal=True)
    assert "heads" in bar
    assert bar.rpartition("heads")[2].split()[1] == "7/9"


def test_without_a_terminal_there_is_a_line_an_epoch_and_no_bar() -> None:
    assert shown(STARTED, PROGRESS, EPOCH, terminal=False) == (
        "training tiny on squares, seed 3, 20 steps, cpu (2 threads) in float32\n"
        "epoch   1  loss 0.5000  train 90.00%  hold-out 95.00%  12 s\n"
    )
