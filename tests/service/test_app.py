import os
import sys
from pathlib import Path

import pytest

from service.app import engine_limits, memory_share
from service.settings import Settings
from training.processors import processors
from training.ram import memory


@pytest.mark.parametrize(("workers", "threads"), [(1, 0), (2, 0), (64, 0), (2, 5)])
def test_workers_divide_the_processors_of_this_container_unless_threads_are_set(workers: int, threads: int) -> None:
    limits = engine_limits(Settings(workers=workers, threads=threads))
    assert limits.threads == (threads or max(1, processors() // workers))


@pytest.mark.skipif(sys.platform != "linux", reason="processors can be taken away from a process on Linux only")
def test_a_container_of_one_processor_gets_one_thread() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert engine_limits(Settings()).threads == 1
    finally:
        os.sched_setaffinity(0, before)


def test_the_other_limits_are_the_settings() -> None:
    settings = Settings(artifacts=Path("x"), device="cpu", max_batch=3, queue_size=300, max_image_pixels=7)
    limits = engine_limits(settings)
    assert engine_limits(settings.model_copy(update={"max_batch": 0})).max_batch == 32
    assert (str(limits.device), limits.max_batch, limits.queue_size, limits.max_pixels) == ("cpu", 3, 300, 7)


@pytest.mark.parametrize(("jobs", "share"), [(0, 0.75), (1, 0.75), (3, 0.25)])
def test_the_jobs_that_run_at_once_share_three_quarters_of_the_memory(jobs: int, share: float) -> None:
    assert memory_share("cpu", jobs) == pytest.approx(share * memory(), abs=1)
