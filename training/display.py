"""Events for the eye: a progress bar with loss, accuracy and time left, and one line an epoch."""

from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from training import events


class Display:
    """Shows a run on a terminal; where there is none, the lines alone."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            redirect_stdout=False,  # what goes there is for programs
        )
        self._task = self._progress.add_task("", total=None, facts="")
        self._accuracy = ""

    def __enter__(self) -> Self:
        return self  # the bar starts with the training: decoding before it shows one of its own

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Started):
            self._started(event)
        elif isinstance(event, events.Notice):
            self._console.print(f"[yellow]note:[/yellow] {escape(event.message)}", highlight=False, soft_wrap=True)
        elif isinstance(event, events.Progress):
            left = timedelta(seconds=round(event.seconds_left))
            speed = f"{event.images_per_second:,.0f} images/s"
            facts = f"loss {event.loss:.3f}  train {event.accuracy:.2%}{self._accuracy}  {speed}  {left} left"
            self._progress.update(self._task, completed=event.step, facts=facts)
        elif isinstance(event, events.Phase):
            self._progress.start()
            self._progress.update(
                self._task, description=event.phase, total=event.steps, completed=event.step, facts=""
            )
        elif isinstance(event, events.Epoch):
            self._accuracy = f"  hold-out {event.holdout_accuracy:.2%}"
            self._console.print(
                f"epoch {event.epoch:3}  loss {event.train_loss:.4f}  train {event.train_accuracy:.2%}"
                f"  hold-out {event.holdout_accuracy:.2%}  {event.seconds:.0f} s",
                highlight=False,
            )

    def _started(self, event: events.Started) -> None:
        self._progress.start()
        self._progress.update(self._task, description=event.recipe, total=event.steps, completed=event.step)
        since = f", from step {event.step}" if event.step else ""
        self._console.print(
            f"training [b]{event.recipe}[/b] on {escape(event.dataset)}, seed {event.seed}, {event.steps} steps{since}"
            f", {event.device} in {event.precision}",
            highlight=False,
        )
