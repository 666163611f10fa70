"""The servers: how each is started, with which settings, and how it is asked. Settings are the best of those tried."""

import glob
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from abc import ABC, abstractmethod
from pathlib import Path

from benchmarks.peers import forms
from benchmarks.peers.forms import Form

HERE = Path(__file__).parent
APPS = HERE / "apps"
ROOT = HERE.parents[1]


class Server(ABC):
    """A server that is measured. A subclass has `defaults` of its own, which NAME:key=value changes."""

    name: str
    defaults: dict[str, str] = {}
    calibrated = False  # whether its probabilities are

    def __init__(self, home: Path, model: Path, classes: list[str], changes: dict[str, str]) -> None:
        """`home` has the environments of setup.sh, `model` is what the peers run."""
        unknown = changes.keys() - self.defaults.keys()
        if unknown:
            has = ", ".join(self.defaults) or "none"
            raise SystemExit(f"{self.name} has no setting {', '.join(sorted(unknown))}; it has {has}")
        self.home, self.model, self.classes = home, model, classes
        self.title = ":".join([self.name, "+".join(f"{key}={value}" for key, value in changes.items())]).rstrip(":")
        self.settings = self.defaults | changes

    @property
    def bin(self) -> Path:
        return self.home / "venvs" / self.name / "bin"

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def installed(self) -> bool:
        return (self.home / "venvs" / self.name / ".installed").exists()

    @abstractmethod
    def forms(self) -> dict[str, Form]:
        """The ways in which it is asked, by name."""

    def prepare(self, work: Path, port: int) -> None:  # noqa: B027 - most need nothing
        """Write what it needs into a folder of its own."""

    @abstractmethod
    def command(self, work: Path, port: int) -> list[str]:
        """What starts it."""

    def environment(self, work: Path, port: int) -> dict[str, str]:
        return {}

    def all_environment(self, work: Path, port: int) -> dict[str, str]:
        """The peers' own variables; one torch thread each, as more were slower."""
        threads = "1"
        common = {
            "PEERS_MODEL": str(self.model),
            "PEERS_CLASSES": ",".join(self.classes),
            "PEERS_THREADS": threads,
            "PEERS_PORT": str(port),
            "PEERS_WORK": str(work),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(APPS),
            "PYTHONWARNINGS": "ignore",
        }
        return (
            common | {f"P_{key.upper()}": value for key, value in self.settings.items()} | self.environment(work, port)
        )


class Safelight(Server):
    """Ours, as `make serve` starts it. Ten classes are asked for, as the peers answer with all ten."""

    name = "safelight"
    defaults = {"threads": "0", "workers": "1", "max_batch": "0"}  # the service's own
    calibrated = True

    @property
    def python(self) -> Path:
        return Path(sys.executable)

    @property
    def installed(self) -> bool:
        return True

    def forms(self) -> dict[str, Form]:
        path = f"/predict?model=cifar10&top_k={len(self.classes)}"
        infer = "/v2/models/cifar10/infer"
        return {
            "multipart": Form(path, forms.multipart("file"), forms.from_safelight, many=True),
            "raw": Form(path, forms.raw, forms.from_safelight),
            "v2": Form(infer, forms.v2_pixels, forms.from_v2, many=True, work="pixels"),
        }

    def command(self, work: Path, port: int) -> list[str]:
        return [str(self.python), "-m", "service", "--port", str(port)]

    def all_environment(self, work: Path, port: int) -> dict[str, str]:
        return {
            "SAFELIGHT_ARTIFACTS": str(ROOT / "artifacts"),
            "SAFELIGHT_STATE": str(work / "state"),
            "SAFELIGHT_THREADS": self.settings["threads"],
            "SAFELIGHT_WORKERS": self.settings["workers"],
            "SAFELIGHT_MAX_BATCH": self.settings["max_batch"],
            "PYTHONPATH": str(ROOT),
        }


class FastApi(Server):
    name = "fastapi"
    defaults = {"workers": "1"}

    def forms(self) -> dict[str, Form]:
        many = {"many": True, "many_path": "/predict_batch", "encode_many": forms.multipart("files")}
        return {"multipart": Form("/predict", forms.multipart("file"), forms.from_peers_json, **many)}

    def command(self, work: Path, port: int) -> list[str]:
        words = ["-m", "uvicorn", "fastapi_app:app", "--host", "127.0.0.1", "--port", str(port)]
        quiet = ["--log-level", "warning", "--no-access-log"]
        return [str(self.python), *words, "--workers", self.settings["workers"], *quiet]


class LitServe(Server):
    name = "litserve"
    defaults = {"workers": "1", "max_batch": "32", "wait_ms": "1"}

    def forms(self) -> dict[str, Form]:
        return {"multipart": Form("/predict", forms.multipart("request"), forms.from_peers_json)}

    def command(self, work: Path, port: int) -> list[str]:
        return [str(self.python), str(APPS / "litserve_app.py")]


class BentoMl(Server):
    name = "bentoml"
    defaults = {"workers": "1", "max_batch": "32"}

    def forms(self) -> dict[str, Form]:
        return {"multipart": Form("/predict", forms.multipart("images"), forms.from_peers_json, many=True)}

    def command(self, work: Path, port: int) -> list[str]:
        where = ["--host", "127.0.0.1", "--port", str(port), "--working-dir", str(APPS)]
        return [str(self.bin / "bentoml"), "serve", "bentoml_app:Peer", *where]

    def environment(self, work: Path, port: int) -> dict[str, str]:
        return {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(work)}


class RayServe(Server):
    """Behind HAProxy, which Ray brings: its own proxy in Python gives a quarter of the requests."""

    name = "ray"
    defaults = {"replicas": "1", "max_batch": "32", "wait_ms": "1"}

    def forms(self) -> dict[str, Form]:
        return {"raw": Form("/predict", forms.raw, forms.from_peers_json)}

    def command(self, work: Path, port: int) -> list[str]:
        return [str(self.python), str(APPS / "ray_app.py")]

    def environment(self, work: Path, port: int) -> dict[str, str]:
        haproxy = work / "ha"
        return {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        }


LOG4J = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="WARN">
  <Appenders><Console name="STDOUT" target="SYSTEM_OUT"><PatternLayout pattern="%d %-5p %m%n"/></Console></Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="off" additivity="false"/>
    <Logger name="TS_METRICS" level="off" additivity="false"/>
    <Logger name="MODEL_METRICS" level="off" additivity="false"/>
    <Root level="warn"><AppenderRef ref="STDOUT"/></Root>
  </Loggers>
</Configuration>
"""


class TorchServe(Server):
    name = "torchserve"
    defaults = {"workers": "2", "max_batch": "32", "wait_ms": "1"}

    def forms(self) -> dict[str, Form]:
        return {"raw": Form("/predictions/peer", forms.raw, forms.from_peers_json)}

    def prepare(self, work: Path, port: int) -> None:
        store = work / "store"
        store.mkdir()
        archiver = [str(self.bin / "torch-model-archiver"), "--model-name", "peer", "--version", "1.0"]
        files = ["--handler", str(APPS / "torchserve_handler.py"), "--extra-files", str(APPS / "workload.py")]
        subprocess.run([*archiver, *files, "--export-path", str(store)], check=True, capture_output=True)
        workers = int(self.settings["workers"])
        model = {
            "defaultVersion": True,
            "marName": "peer.mar",
            "minWorkers": workers,
            "maxWorkers": workers,
            "batchSize": int(self.settings["max_batch"]),
            "maxBatchDelay": int(self.settings["wait_ms"]),
            "responseTimeout": 120,
        }
        properties = {
            "inference_address": f"http://127.0.0.1:{port}",
            "management_address": f"http://127.0.0.1:{port + 1}",
            "metrics_address": f"http://127.0.0.1:{port + 2}",
            "model_store": store,
            "load_models": "peer.mar",
            "disable_token_authorization": "true",
            "job_queue_size": 1000,
            "enable_envvars_config": "false",
            "install_py_dep_per_model": "false",
            "disable_system_metrics": "true",
            "models": json.dumps({"peer": {"1.0": model}}),
        }
        (work / "config.properties").write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        (work / "log4j2.xml").write_text(LOG4J)

    def command(self, work: Path, port: int) -> list[str]:
        settings = ["--ts-config", str(work / "config.properties"), "--log-config", str(work / "log4j2.xml")]
        return [str(self.bin / "torchserve"), "--start", "--foreground", "--ncs", "--disable-token-auth", *settings]

    def environment(self, work: Path, port: int) -> dict[str, str]:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return {"LOG_LOCATION": str(work), "METRICS_LOCATION": str(work), "TEMP": str(work), "PATH": path}


class MlServer(Server):
    name = "mlserver"
    defaults = {"parallel_workers": "1", "max_batch": "32", "wait_ms": "1"}

    def forms(self) -> dict[str, Form]:
        return {"v2 base64": Form("/v2/models/peer/infer", forms.v2_base64, forms.from_v2, many=True)}

    def prepare(self, work: Path, port: int) -> None:
        server = {
            "host": "127.0.0.1",
            "http_port": port,
            "grpc_port": port + 1,
            "metrics_endpoint": None,
            "debug": False,
            "parallel_workers": int(self.settings["parallel_workers"]),
            "metrics_dir": str(work / "metrics"),
            "gzip_enabled": False,
            "access_log": False,
        }
        model = {
            "name": "peer",
            "implementation": "mlserver_app.Peer",
            "max_batch_size": int(self.settings["max_batch"]),
            "max_batch_time": float(self.settings["wait_ms"]) / 1000,
        }
        (work / "settings.json").write_text(json.dumps(server))
        (work / "model-settings.json").write_text(json.dumps(model))

    def command(self, work: Path, port: int) -> list[str]:
        return [str(self.bin / "mlserver"), "start", str(work)]


# A batch of up to 64 fits, so that the request of 64 does.
TRITON = """name: "peer"
backend: "python"
max_batch_size: 64
input [{{ name: "{input}" {tensor} }}]
output [{{ name: "label" data_type: TYPE_STRING dims: [ 1 ] }},
        {{ name: "probabilities" data_type: TYPE_FP32 dims: [ {classes} ] }}]
instance_group [{{ count: {instances} kind: KIND_CPU }}]
dynamic_batching {{ preferred_batch_size: [ {max_batch} ] max_queue_delay_microseconds: 0 }}
"""
TENSORS = {
    "pictures": "data_type: TYPE_STRING dims: [ 1 ]",
    "pixels": "data_type: TYPE_UINT8 dims: [ 3, 32, 32 ]",
}


class Triton(Server):
    """The tritonserver and the python backend that the nvidia-pytriton wheel brings; it has no backend for PyTorch."""

    name = "triton"
    defaults = {"instances": "2", "max_batch": "32", "http_threads": "2", "input": "pictures"}

    def forms(self) -> dict[str, Form]:
        path = "/v2/models/peer/infer"
        if self.settings["input"] == "pixels":
            return {"v2": Form(path, forms.v2_pixels, forms.from_v2, many=True, work="pixels")}
        return {"v2 pictures": Form(path, forms.v2_pictures, forms.from_v2, many=True)}

    @property
    def packages(self) -> Path:
        (found,) = glob.glob(str(self.home / "venvs" / self.name / "lib" / "python*" / "site-packages"))
        return Path(found)

    def prepare(self, work: Path, port: int) -> None:
        model = work / "repository" / "peer" / "1"
        model.mkdir(parents=True)
        shutil.copy(APPS / "triton_model.py", model / "model.py")
        values = self.settings | {"tensor": TENSORS[self.settings["input"]], "classes": len(self.classes)}
        (model.parent / "config.pbtxt").write_text(TRITON.format(**values))
        # The backend, with the stub for the environment's Python.
        server = self.packages / "pytriton" / "tritonserver"
        backend = work / "backends" / "python"
        shutil.copytree(server / "backends" / "python", backend)
        version = self.packages.parent.name.removeprefix("python")
        stub = backend / "triton_python_backend_stub"
        shutil.copy(server / "python_backend_stubs" / version / stub.name, stub)
        stub.chmod(0o755)

    def command(self, work: Path, port: int) -> list[str]:
        options = {
            "model-repository": work / "repository",
            "backend-directory": work / "backends",
            "http-address": "127.0.0.1",
            "http-port": port,
            "allow-grpc": "false",
            "allow-metrics": "false",
            "http-thread-count": self.settings["http_threads"],
            "backend-config": f"python,shm-region-prefix-name=peers{port}",
        }
        binary = self.packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"
        return [str(binary), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]

    def environment(self, work: Path, port: int) -> dict[str, str]:
        base = self.home / "venvs" / "base" / "lib" / self.packages.parent.name / "site-packages"
        libraries = [sysconfig.get_config_var("LIBDIR") or "", str(self.packages / "nvidia_pytriton.libs")]
        return {
            "PEERS_SYS_PATH": os.pathsep.join([str(APPS), str(self.packages), str(base)]),
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        }


KINDS: dict[str, type[Server]] = {
    kind.name: kind for kind in (Safelight, FastApi, LitServe, BentoMl, RayServe, TorchServe, MlServer, Triton)
}
ALL = [*KINDS, "triton:input=pixels"]


def choose(words: list[str], home: Path, model: Path, classes: list[str]) -> list[Server]:
    """Servers by NAME or NAME:key=value+key=value; `all` are all of them."""
    chosen = []
    for word in [name for given in words for name in (ALL if given == "all" else [given])]:
        name, _, rest = word.partition(":")
        if name not in KINDS:
            raise SystemExit(f"there is no server {name!r}; there are {', '.join(KINDS)}")
        changes = dict(pair.partition("=")[::2] for pair in rest.split("+") if pair)
        chosen.append(KINDS[name](home, model, classes, changes))
    return chosen
