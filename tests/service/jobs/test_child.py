import asyncio
import sys
from pathlib import Path

import pytest

from service.jobs.child import LOG, Child

TELL = "import os; print(os.environ['GOMP_SPINCOUNT'], os.environ['HOME'])"


@pytest.mark.parametrize(("set_by_the_user", "told"), [(None, "2000000"), ("5", "5")])
def test_a_job_s_idle_threads_stay_awake_for_a_while_where_the_user_says_nothing_else(
    set_by_the_user: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if set_by_the_user:
        monkeypatch.setenv("GOMP_SPINCOUNT", set_by_the_user)

    async def main() -> int | None:
        child = await Child.start([sys.executable, "-c", TELL], tmp_path)
        return await child.exited(60)

    assert asyncio.run(main()) == 0
    assert (tmp_path / LOG).read_text() == f"{told} /home\n"
