import asyncio
import platform
import re
import signal

import torch
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from service.lifecycle import Lifecycle, drain_on_sigterm
from tests.tiny import grey
from training import __version__
from training.processors import processors

PNG = {"Content-Type": "image/png"}


def metrics(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_service_with_a_good_model_is_live_and_ready(client: TestClient) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}


def test_metrics_count_requests_images_errors_batches_and_stages(client: TestClient) -> None:
    before = metrics(client)
    client.post("/predict", files=[("file", ("a", grey(1))), ("file", ("b", b"no picture"))])
    after = metrics(client)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after.get(key, 0) - before.get(key, 0)

    greys = {"model": "greys", "version": "1"}
    assert grown("safelight_requests_total", route="/predict", status="200") == 1
    assert grown("safelight_images_total", **greys) == 1
    assert grown("safelight_errors_total", code="not_an_image") == 1
    assert grown("safelight_batch_size_count", **greys) == 1
    assert grown("safelight_batch_size_sum", **greys) == 1
    for stage in ("decode", "queue", "infer", "total"):
        assert grown("safelight_stage_seconds_count", stage=stage, **greys) == 1
    assert after["safelight_pending_images", tuple(sorted(greys.items()))] == 0


def test_paths_that_do_not_exist_share_one_label(client: TestClient) -> None:
    for path in ("/a", "/b/c"):
        assert client.get(path).json()["code"] == "not_found"
    labels = {dict(key[1]).get("route") for key in metrics(client) if key[0] == "safelight_requests_total"}
    assert "unmatched" in labels
    assert not labels & {"/a", "/b/c"}


def test_info_shows_what_runs_where_and_how_it_was_chosen(client: TestClient) -> None:
    info = client.get("/info").json()
    assert (info["name"], info["version"], info["device"]) == ("safelight", __version__, "cpu")
    assert info["versions"]["python"] == platform.python_version()
    assert info["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert info["limits"]["max_images"] == 256
    assert (info["workers"], info["threads"]) == (1, processors())
    (engine,) = info["engines"]
    assert (engine["model"], engine["version"]) == ("greys", "1")
    assert engine["engine"] in {timing["name"] for timing in engine["timings"]}
    assert set(engine["timings"][0]) == {
        "name",
        "milliseconds",
        "argmax_differences",
        "probability_difference",
        "refused",
    }


def test_the_documentation_needs_no_network(client: TestClient) -> None:
    page = client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    for source in sources:
        assert client.get(source).status_code == 200
    assert client.get("/", follow_redirects=False).headers["location"] == "/docs"


def test_sigterm_is_noted_before_the_servers_own_handler_is_called() -> None:
    seen: list[tuple[bool, float]] = []
    lifecycle = Lifecycle()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with drain_on_sigterm(lifecycle, 0.05):
            begun = loop.time()
            signal.raise_signal(signal.SIGTERM)
            assert lifecycle.draining
            while not seen:
                await asyncio.sleep(0.005)
            assert loop.time() - begun >= 0.05

    before = signal.signal(signal.SIGTERM, lambda *_: seen.append((lifecycle.draining, 0)))
    try:
        asyncio.run(main())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [(True, 0)]
