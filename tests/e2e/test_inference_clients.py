"""The clients that people already have, as they are, against a real server: Triton's and KServe's."""

import asyncio
import base64
import gzip
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from openai import OpenAI
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from tests.tiny import GREYS, SPEC, Server, grey, make_bundle, serving, shade, until_all_are_verified

LEVELS = (3, 9, 15)
MISFITS = {("pictures", False), ("base64", True)}  # a file is no text; and in binary it needs no base64


def greys(*levels: int, kind: str = "uint8") -> np.ndarray:
    return np.stack([np.full(SPEC.shape, shade(level), kind) for level in levels])  # [N, 1, 8, 8]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("clients")
    make_bundle(root / "artifacts")
    make_bundle(root / "artifacts", activate=False)
    make_bundle(root / "artifacts", "other")
    with serving(root / "artifacts", root, default_model="greys", max_images="32") as server:
        until_all_are_verified(server)
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


def as_input(values: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    name = "pictures" if values.dtype == np.object_ else "pixels"
    tensor = triton.InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype))
    return tensor.set_data_from_numpy(values, binary_data=binary)


# --- tritonclient ---


def test_tritonclient_finds_what_is_there(client: triton.InferenceServerClient) -> None:
    assert (client.is_server_live(), client.is_server_ready()) == (True, True)
    assert client.is_model_ready("greys")
    assert client.is_model_ready("greys", "2")
    assert not client.is_model_ready("greys", "3")
    assert not client.is_model_ready("pets")
    assert client.get_server_metadata()["name"] == "safelight"
    metadata = client.get_model_metadata("greys", "1")
    assert (metadata["name"], metadata["versions"]) == ("greys", ["1", "2"])
    config = client.get_model_config("greys")
    for described, configured in zip(metadata["inputs"], config["input"], strict=True):
        assert described["name"] == configured["name"]
    assert [output["name"] for output in config["output"]] == [output["name"] for output in metadata["outputs"]]
    for described, configured in zip(
        metadata["inputs"] + metadata["outputs"], config["input"] + config["output"], strict=True
    ):
        assert described["shape"] == [-1, *configured["dims"]]


KINDS = ["uint8", "float32", "pictures", "base64"]  # the last is what the client takes for text: strings in JSON
EIGHT = (3, 9, 15, 0, 7, 12, 1, 4)  # as many make an answer long enough to be packed
PACKINGS = [None, "gzip", "deflate"]


def values(kind: str, *levels: int) -> np.ndarray:
    if kind in ("uint8", "float32"):
        return greys(*levels, kind=kind)
    encoded = [grey(level) for level in levels]
    return np.array([base64.b64encode(one) for one in encoded] if kind == "base64" else encoded, dtype=np.object_)


@pytest.fixture(scope="module")
def telling(server: Server) -> Iterator[triton.InferenceServerClient]:
    """A client that prints what it gets, headers too."""
    with triton.InferenceServerClient(server.url.removeprefix("http://"), verbose=True) as client:
        yield client


@pytest.mark.parametrize(
    ("kind", "binary_in"),
    [(kind, binary) for kind in KINDS for binary in (True, False) if (kind, binary) not in MISFITS],
)
@pytest.mark.parametrize("out", ["binary", "json", "classification", "binary classification"])
def test_tritonclient_gets_the_same_answer_whatever_the_form_and_packing(
    telling: triton.InferenceServerClient, capsys: pytest.CaptureFixture[str], kind: str, binary_in: bool, out: str
) -> None:
    sent = as_input(values(kind, *EIGHT), binary=binary_in)
    expected = telling.infer("greys", [as_input(greys(*EIGHT))])
    best = {"class_count": 3} if "classification" in out else {}
    outputs = [triton.InferRequestedOutput("logits", binary_data="binary" in out, **best)]
    outputs.append(triton.InferRequestedOutput("label", binary_data="binary" in out))
    for packed, back in itertools.product(PACKINGS, PACKINGS):
        capsys.readouterr()
        result = telling.infer(
            "greys",
            [sent],
            outputs=outputs,
            request_id="7",
            request_compression_algorithm=packed,
            response_compression_algorithm=back,
        )
        (told,) = re.findall(r"^<HTTPSocketPoolResponse .*", capsys.readouterr().out, re.M)
        assert re.findall(r"'content-encoding': '(\w+)'", told, re.I) == ([back] if back else [])
        assert result.get_response()["id"] == "7"
        assert texts(result.as_numpy("label")) == [[GREYS[level]] for level in EIGHT]
        if best:
            assert texts(result.as_numpy("logits")) == best_of(expected.as_numpy("logits"), 3)
        else:
            assert result.as_numpy("logits").tobytes() == expected.as_numpy("logits").tobytes()


def texts(strings: np.ndarray) -> list[list[str]]:
    """[N, K]; the client has bytes where they were binary."""
    return [[one.decode() if isinstance(one, bytes) else one for one in row] for row in strings]


def best_of(logits: np.ndarray, count: int) -> list[list[str]]:
    """As the classification extension writes them: value, index, label."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return [
        [f"{row[index]:f}:{index}:{GREYS[index]}" for index in best] for row, best in zip(logits, order, strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "binary"),
    [(kind, binary) for kind in KINDS for binary in (True, False) if (kind, binary) not in MISFITS],
)
def test_tritonclient_may_send_as_many_as_the_configuration_says_and_not_one_more(
    client: triton.InferenceServerClient, kind: str, binary: bool
) -> None:
    most = client.get_model_config("greys")["max_batch_size"]
    assert most == 32
    for count in (1, 3, most):
        levels = [place % 16 for place in range(count)]
        found = client.infer("greys", [as_input(values(kind, *levels), binary=binary)]).as_numpy("logits")
        assert found.argmax(1).tolist() == levels
    with pytest.raises(InferenceServerException) as caught:
        client.infer("greys", [as_input(values(kind, *[1] * (most + 1)), binary=binary)])
    assert (caught.value.status(), caught.value.message()) == (
        "413",
        "33 pictures in one request; the limit is 32: send several requests",
    )


def test_tritonclient_s_priority_and_timeout_are_taken(client: triton.InferenceServerClient) -> None:
    found = client.infer("greys", [as_input(greys(*LEVELS))], priority=1, timeout=5_000_000)
    assert found.as_numpy("logits").argmax(1).tolist() == list(LEVELS)


def test_tritonclient_finds_what_was_counted(client: triton.InferenceServerClient) -> None:
    def counted(*which: str) -> dict[tuple[str, str], tuple[int, int]]:
        found = client.get_inference_statistics(*which)["model_stats"]
        return {
            (one["name"], one["version"]): (one["inference_count"], one["inference_stats"]["success"]["count"])
            for one in found
        }

    every = {("greys", "1"), ("greys", "2"), ("other", "1")}
    before = counted()
    assert before.keys() == every
    for _ in range(2):
        client.infer("greys", [as_input(greys(*LEVELS))], model_version="2")
    pictures, requests = before["greys", "2"]
    grown = {("greys", "2"): (pictures + 6, requests + 2)}
    assert counted() == before | grown
    assert counted("greys") == {key: found for key, found in (before | grown).items() if key[0] == "greys"}
    assert counted("greys", "2") == grown


def test_tritonclient_is_told_what_was_wrong(client: triton.InferenceServerClient) -> None:
    def told(model: str, values: np.ndarray, version: str = "", **outputs: Any) -> tuple[str | None, str]:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(model, [as_input(values)], model_version=version, **outputs)
        return caught.value.status(), caught.value.message()

    assert told("greys", greys(*range(16), *range(16), 1)) == (
        "413",
        "33 pictures in one request; the limit is 32: send several requests",
    )
    assert told("pets", greys(1)) == ("404", "there is no model 'pets'; there is greys, other")
    assert told("greys", greys(1), "9") == ("404", "model greys has no version 9; it has 1, 2")
    assert told("greys", greys(1)[:, :, :4]) == (
        "400",
        "input 'pixels' has the shape [1, 1, 4, 8]; the model takes [N, 1, 8, 8]",
    )
    assert told("greys", greys(1), outputs=[triton.InferRequestedOutput("box")]) == (
        "400",
        "there is no output 'box'; there is probabilities, logits, label",
    )
    assert told("greys", np.array([b"no picture"], dtype=np.object_))[0] == "400"
    assert client.is_server_ready()


def test_tritonclient_loads_and_unloads(client: triton.InferenceServerClient) -> None:
    def states() -> dict[str, str]:
        return {entry["name"]: entry["state"] for entry in client.get_model_repository_index()}

    assert states() == {"greys": "READY", "other": "READY"}
    client.unload_model("other")
    assert states() == {"greys": "READY", "other": "UNAVAILABLE"}
    assert not client.is_model_ready("other")
    with pytest.raises(InferenceServerException) as caught:
        client.infer("other", [as_input(greys(1))])
    assert caught.value.status() == "404"
    assert "model other is unloaded" in caught.value.message()
    client.load_model("other")
    assert states() == {"greys": "READY", "other": "READY"}
    assert client.infer("other", [as_input(greys(1))]).as_numpy("logits").argmax() == 1
    with pytest.raises(InferenceServerException) as caught:
        client.load_model("pets")
    assert caught.value.message() == "there is no model 'pets'; there is greys, other"


def test_requests_at_once_share_batches_and_each_gets_its_own(server: Server) -> None:
    """Those of two pictures each are a batch at least, whoever comes beside them."""
    url = server.url.removeprefix("http://")
    with triton.InferenceServerClient(url, concurrency=16) as client:

        def statistics() -> dict[str, Any]:
            (found,) = client.get_inference_statistics("greys", "1")["model_stats"]
            return dict(found)

        before = statistics()
        for _ in range(10):
            levels = [(3 * place) % 16 for place in range(32)]
            waiting = [client.async_infer("greys", [as_input(greys(level, 5))], model_version="1") for level in levels]
            found = [request.get_result().as_numpy("logits").argmax(1).tolist() for request in waiting]
            assert found == [[level, 5] for level in levels]
        after = statistics()
    images = after["inference_count"] - before["inference_count"]
    batches = after["execution_count"] - before["execution_count"]
    success = {
        part: after["inference_stats"]["success"][part] - before["inference_stats"]["success"][part]
        for part in ("count", "ns")
    }
    assert (images, success["count"]) == (640, 320)
    assert 10 <= batches <= 320
    assert success["ns"] > 0


# --- perf_analyzer, as far as a client in Python can stand in for it ---

Counts = dict[str, int]


class PerfAnalyzer:
    """Its steps, from its source: read metadata and configuration, make an input of each that is named there, keep some
    requests under way, and look at the statistics before and after."""

    def __init__(self, client: triton.InferenceServerClient, model: str, batch: int = 1) -> None:
        self.client, self.model = client, model
        metadata, config = client.get_model_metadata(model), client.get_model_config(model)
        assert "statistics" in client.get_server_metadata()["extensions"]
        assert batch <= config["max_batch_size"] > 0
        self.optional = {one["name"] for one in config["input"] if one.get("optional", False)}
        self.types = {one["name"]: one["datatype"] for one in metadata["inputs"]}
        self.shapes = {one["name"]: [batch, *one["shape"][1:]] for one in metadata["inputs"]}  # the first is the batch
        for name, shape in self.shapes.items():
            assert len(shape) > 1, f"unable to set shape for the input {name}"
            assert -1 not in shape, f"input {name} contains dynamic shape"
        self.outputs = [triton.InferRequestedOutput(one["name"]) for one in metadata["outputs"]]

    def inputs(self, data: dict[str, np.ndarray] | None = None) -> list[triton.InferInput]:
        """By default random bytes and strings for all of them; with `data` what that has, and those must be enough."""
        if data is None:
            random = np.random.default_rng(0)
            data = {
                name: np.full(shape, "x" * 128, np.object_)
                if self.types[name] == "BYTES"
                else random.integers(0, 256, shape, triton_to_np_dtype(self.types[name]))
                for name, shape in self.shapes.items()
            }
        assert self.shapes.keys() - data.keys() <= self.optional
        made = []
        for name, values in sorted(data.items()):
            made.append(triton.InferInput(name, self.shapes[name], self.types[name]).set_data_from_numpy(values))
        return made

    def counts(self) -> Counts:
        """Of the version that has answered most; several at once, and it only warns."""
        found = self.client.get_inference_statistics(self.model)["model_stats"]
        most = max(found, key=lambda one: one["inference_stats"]["queue"]["count"])
        stages = {name: figures["count"] for name, figures in most["inference_stats"].items()}
        return {name: most[name] for name in ("inference_count", "execution_count")} | stages

    def run(self, requests: int, inputs: list[triton.InferInput]) -> Counts:
        """What the statistics grew by. It ends with an error where the three parts of computing differ in number."""
        before = self.counts()
        waiting = [
            self.client.async_infer(self.model, inputs, outputs=self.outputs, request_id=str(number))
            for number in range(requests)
        ]
        for request in waiting:
            assert request.get_result().as_numpy("probabilities").sum(1) == pytest.approx(1)
        grown = {name: count - before[name] for name, count in self.counts().items()}
        assert grown["compute_input"] == grown["compute_infer"] == grown["compute_output"]
        return grown


@pytest.fixture
def busy_client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=16) as client:
        yield client


@pytest.mark.parametrize("batch", [1, 4])
def test_perf_analyzer_s_default_mode_fills_every_input_and_is_answered(
    busy_client: triton.InferenceServerClient, batch: int
) -> None:
    analyzer = PerfAnalyzer(busy_client, "greys", batch)
    inputs = analyzer.inputs()
    assert [tensor.name() for tensor in inputs] == ["pictures", "pixels"]
    grown = analyzer.run(32, inputs)
    assert (grown["inference_count"], grown["success"], grown["queue"], grown["fail"]) == (32 * batch, 32, 32, 0)
    assert 1 <= grown["execution_count"] <= 32
    pixels = next(tensor for tensor in inputs if tensor.name() == "pixels")
    both, alone = (busy_client.infer("greys", sent).as_numpy("logits") for sent in (inputs, [pixels]))
    assert both.tobytes() == alone.tobytes()


def test_perf_analyzer_may_be_given_pictures(busy_client: triton.InferenceServerClient) -> None:
    analyzer = PerfAnalyzer(busy_client, "greys", 2)
    grown = analyzer.run(8, analyzer.inputs({"pictures": values("pictures", 3, 5).reshape(2, 1)}))
    assert (grown["inference_count"], grown["success"], grown["fail"]) == (16, 8, 0)


# --- KServe's client ---


def asked(url: str, protocol: str, work: Any) -> Any:
    async def main() -> Any:
        client = InferenceRESTClient(RESTConfig(protocol=protocol, timeout=30))
        try:
            return await work(client, url)
        finally:
            await client.close()

    return asyncio.run(main())


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_kserve_finds_what_is_there(server: Server, protocol: str) -> None:
    async def work(client: InferenceRESTClient, url: str) -> None:
        if protocol == "v2":
            assert await client.is_server_ready(url)
            assert await client.is_server_live(url)
            assert not await client.is_model_ready(url, "pets")
        assert await client.is_model_ready(url, "greys")

    asked(server.url, protocol, work)


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary", [True, False])
def test_kserve_gets_tensors(server: Server, binary: bool, binary_out: bool) -> None:
    async def work(client: InferenceRESTClient, url: str) -> Any:
        tensor = InferInput("pixels", [3, *SPEC.shape], "UINT8")
        tensor.set_data_from_numpy(greys(*LEVELS), binary_data=binary)
        said = {"binary_data_output": True} if binary_out else None
        request = InferRequest("greys", [tensor], request_id="7", parameters=said)
        headers: dict[str, str] = {}
        answered = await client.infer(url, request, model_name="greys", response_headers=headers)
        assert ("inference-header-content-length" in headers) is binary_out
        return answered

    found = asked(server.url, "v2", work)
    assert (found.model_name, found.id) == ("greys", "7")
    logits = next(output for output in found.outputs if output.name == "logits")
    assert logits.as_numpy().argmax(1).tolist() == list(LEVELS)


@pytest.mark.parametrize("instances", ["pixels", "base64"])
def test_kserve_s_older_protocol_gets_predictions(server: Server, instances: str) -> None:
    async def work(client: InferenceRESTClient, url: str) -> Any:
        encoded = [{"b64": base64.b64encode(grey(level)).decode()} for level in LEVELS]
        data = {"instances": greys(*LEVELS).tolist() if instances == "pixels" else encoded}
        return await client.infer(url, data, model_name="greys")

    found = asked(server.url, "v1", work)["predictions"]
    assert [one["label"] for one in found] == [GREYS[level] for level in LEVELS]
    image = httpx.post(f"{server.url}/predict", content=grey(3), headers={"Content-Type": "image/png"}).json()
    assert found[0] == image["predictions"][0]


def test_kserve_is_told_what_was_wrong(server: Server) -> None:
    async def infer(client: InferenceRESTClient, url: str) -> Any:
        tensor = InferInput("pixels", [1, 1], "UINT8", data=[[1]])
        return await client.infer(url, InferRequest("greys", [tensor]), model_name="greys")

    async def predict(client: InferenceRESTClient, url: str) -> Any:
        return await client.infer(url, {"instances": [[1, 2]]}, model_name="greys")

    async def explain(client: InferenceRESTClient, url: str) -> Any:
        return await client.explain(url, "greys", {"instances": [1]})

    with pytest.raises(httpx.HTTPStatusError, match=r"^input 'pixels' has the shape \[1, 1\]; the model takes"):
        asked(server.url, "v2", infer)
    with pytest.raises(httpx.HTTPStatusError, match="`data` of input 'pixels' has the shape"):
        asked(server.url, "v1", predict)
    with pytest.raises(httpx.HTTPStatusError, match="greys explains nothing here; :predict has its probabilities"):
        asked(server.url, "v1", explain)


def test_the_openai_client_lists_the_models(server: Server) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["greys", "other"]
        assert client.models.retrieve("greys").id == "greys"


def test_a_bomb_and_broken_bodies_leave_the_server_ready(server: Server) -> None:
    url = f"{server.url}/v2/models/greys/infer"
    bomb = gzip.compress(bytes(200_000_000), 1)
    assert httpx.post(url, content=bomb, headers={"Content-Encoding": "gzip"}, timeout=30).status_code == 413
    deep = json.dumps({"inputs": []})[:-2].encode() + b"[" * 1_000_000
    assert httpx.post(url, content=deep, timeout=30).status_code == 400
    assert httpx.get(f"{server.url}/v2/health/ready").json() == {"ready": True}
