"""The Open Inference Protocol's messages: JSON, and tensors in it or, as they are in memory, behind it.

From bytes to the pictures that are asked about, and from the model's rows to bytes. Knows nothing of HTTP, nor of who
computes. The tensors behind the JSON are its binary tensor extension: little-endian, row-major, in the order of their
descriptions; a string is its length in four bytes, then itself.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field, Strict, ValidationError
from pydantic_core import to_json

from service.api.bodies import from_base64
from service.errors import MalformedBody, NoImages, TensorInvalid, TooManyImages
from service.inference.predictor import Picture
from training.bundle.answers import Row
from training.bundle.images import Pixels
from training.bundle.manifest import InputSpec, Manifest

PIXELS, PICTURES = "pixels", "pictures"  # the inputs; of a request that has both, pixels are read
PROBABILITIES, LOGITS, LABEL = "probabilities", "logits", "label"  # the outputs; all of them where none is named

PIXEL_TYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("<u1"), "FP32": np.dtype("<f4")}
OUTPUT_TYPES = {PROBABILITIES: "FP32", LOGITS: "FP32", LABEL: "BYTES"}

KEPT_HEADS, KEPT_BYTES = 100, 2_000  # most clients send the same JSON again and again before other tensors

Strings = list[bytes]

Whole = Annotated[int, Strict(), Field(ge=0, le=2**64 - 1)]  # the protocol's numbers have 64 bits and no sign
Flag = Annotated[bool, Strict()]


def null_is(absent: object) -> BeforeValidator:
    """Some clients send null for what they don't say."""
    return BeforeValidator(lambda value: absent if value is None else value)


# --- the messages' JSON; parameters that aren't named here are passed over ---


class InputParameters(BaseModel, extra="allow", frozen=True):
    binary_data_size: Whole | None = None


class OutputParameters(BaseModel, extra="allow", frozen=True):
    binary_data: Flag | None = None
    classification: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="how many of the best classes to name in the tensor's place"
    )


class QuestionParameters(BaseModel, extra="allow", frozen=True):
    binary_data_output: Flag | None = Field(None, description="for the outputs that don't say it themselves")
    timeout: Whole | None = Field(None, description="in microseconds; 0 is none")
    priority: Whole | None = Field(None, description="changes nothing: there is one queue")


class Input(BaseModel, frozen=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: Annotated[InputParameters, null_is({})] = Field(default_factory=InputParameters)
    data: list[Any] | None = None

    @property
    def size(self) -> int | None:
        """Of its part behind the JSON; None where it stands in `data`. Raises TensorInvalid."""
        size = self.parameters.binary_data_size
        if size is not None and self.data is not None:
            raise TensorInvalid(f"input {self.name[:80]!r} has both `data` and a binary_data_size; send one of them")
        return size


class Output(BaseModel, frozen=True):
    name: str
    parameters: Annotated[OutputParameters, null_is({})] = Field(default_factory=OutputParameters)


class Question(BaseModel, frozen=True):
    id: str | None = None
    parameters: Annotated[QuestionParameters, null_is({})] = Field(default_factory=QuestionParameters)
    inputs: list[Input] = Field(min_length=1)
    outputs: Annotated[list[Output], null_is([])] = []

    @property
    def timeout_seconds(self) -> float | None:
        return self.parameters.timeout / 1e6 if self.parameters.timeout else None


@dataclass(frozen=True)
class Described:
    """An input or output as the model's metadata has it; `shape` is of one picture."""

    name: str
    datatype: str
    shape: list[int]


@dataclass(frozen=True)
class Message:
    """`head_bytes`: how much of the body is JSON, where tensors follow it."""

    body: bytes
    head_bytes: int | None


# --- what there is ---


def inputs(manifest: Manifest) -> list[Described]:
    return [Described(PIXELS, "UINT8", list(manifest.input.shape)), Described(PICTURES, "BYTES", [1])]


def outputs(manifest: Manifest) -> list[Described]:
    return [
        Described(name, datatype, [1] if name == LABEL else [len(manifest.classes)])
        for name, datatype in OUTPUT_TYPES.items()
    ]


# --- from bytes to pictures ---


def read(body: bytes, head_bytes: int | None, spec: InputSpec, max_images: int) -> tuple[Question, list[Picture]]:
    """What is asked, and about which pictures. `head_bytes` 0: the body is one encoded picture and nothing else.

    Raises MalformedBody, TensorInvalid, NoImages, TooManyImages.
    """
    if head_bytes == 0:
        whole = Input(name=PICTURES, datatype="BYTES", shape=[1])
        return Question(inputs=[whole], parameters=QuestionParameters(binary_data_output=True)), [_not_empty(body)]
    if head_bytes is not None and head_bytes > len(body):
        raise MalformedBody(f"Inference-Header-Content-Length is {head_bytes}; the body has only {len(body)} bytes")
    if head_bytes is None:
        question, behind = _asked(body), b""
    else:
        head, behind = body[:head_bytes], body[head_bytes:]
        question = _asked_kept(head) if len(head) <= KEPT_BYTES and b'"data"' not in head else _asked(head)
    return question, pictures_of(question, behind, spec, max_images)


def pictures_of(question: Question, behind: bytes, spec: InputSpec, max_images: int) -> list[Picture]:
    """What the input holds; `behind` is what follows the JSON. Raises TensorInvalid, NoImages, TooManyImages."""
    tensor = _chosen(question.inputs)
    part = _part_of(tensor, question.inputs, behind)
    if tensor.size is None and tensor.data is None:
        raise TensorInvalid(f"input {tensor.name!r} has no data: neither `data` nor a binary_data_size")
    if tensor.name == PIXELS:
        return list(_pixels(tensor, part, spec, max_images))
    return _pictures(tensor, part, max_images)


def _asked(head: bytes) -> Question:
    """Raises MalformedBody, TensorInvalid."""
    try:
        question = Question.model_validate_json(head)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise MalformedBody(f"{where}: {first['msg']}") from error
    _chosen(question.inputs)
    _check_parameters(question)
    _check_outputs(question)
    return question


_asked_kept = lru_cache(KEPT_HEADS)(_asked)


def _chosen(sent: list[Input]) -> Input:
    """The one to read. A client that fills whatever the metadata names, as perf_analyzer does, has filled both."""
    names = [tensor.name for tensor in sent]
    if len(set(names)) < len(names) or not set(names) <= {PIXELS, PICTURES}:
        found = [name[:80] for name in names[:10]]
        raise TensorInvalid(f"a request has one input, {PIXELS!r} or {PICTURES!r}; this one has {found}")
    return next((tensor for tensor in sent if tensor.name == PIXELS), sent[0])


def _part_of(tensor: Input, sent: list[Input], behind: bytes) -> bytes:
    """Its bytes of those behind the JSON, where the inputs lie in their order."""
    sizes = [one.size or 0 for one in sent]
    if sum(sizes) != len(behind):
        told = " and ".join(f"{size} of {one.name!r}" for one, size in zip(sent, sizes, strict=True))
        raise TensorInvalid(f"{len(behind)} bytes follow the JSON; by binary_data_size there should be {told}")
    place = sent.index(tensor)
    start = sum(sizes[:place])
    return behind[start : start + sizes[place]]


def _check_parameters(question: Question) -> None:
    """Raises TensorInvalid for what would be wrong to pass over."""
    if question.id is not None and "\0" in question.id:
        raise TensorInvalid("`id` holds a null character; send one without")
    places: list[BaseModel] = [question.parameters]
    places += [tensor.parameters for tensor in question.inputs]
    places += [output.parameters for output in question.outputs]
    for name in (name for parameters in places for name in parameters.model_extra or ()):
        if name.startswith(("shared_memory", "sequence_")):
            raise TensorInvalid(f"the parameter {name[:80]!r} isn't supported here: send the tensors in the request")


def _pixels(tensor: Input, behind: bytes, spec: InputSpec, max_images: int) -> Pixels:
    """uint8 [N, C, H, W] as the network takes them; FP32 only where each value is one of 0, 1 … 255."""
    shape = tuple(tensor.shape)
    count = _count(shape[0] if shape else 0, max_images)
    if shape[1:] != spec.shape:
        wanted = ", ".join(map(str, spec.shape))
        raise TensorInvalid(f"input {PIXELS!r} has the shape {list(shape)}; the model takes [N, {wanted}]")
    if tensor.datatype not in PIXEL_TYPES:
        raise TensorInvalid(f"input {PIXELS!r} is {tensor.datatype[:20]!r}; the model takes UINT8, or FP32 of 0 to 255")
    kind = PIXEL_TYPES[tensor.datatype]
    values = _from_json(tensor, shape) if tensor.data is not None else _from_memory(behind, kind, shape)
    if values.dtype != np.uint8:
        with np.errstate(invalid="ignore"):  # NaN and infinity equal nothing that they are cast to
            whole = values.astype(np.uint8)
        if not np.array_equal(whole, values):
            raise TensorInvalid(f"input {PIXELS!r} holds other values than the whole numbers from 0 to 255")
        values = whole
    return values.reshape(count, *spec.shape)


def _from_memory(behind: bytes, kind: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    needed = math.prod(shape) * kind.itemsize
    if len(behind) != needed:
        raise TensorInvalid(f"input {PIXELS!r} of the shape {list(shape)} takes {needed} bytes, not {len(behind)}")
    return np.frombuffer(behind, kind)


def _from_json(tensor: Input, shape: tuple[int, ...]) -> NDArray[Any]:
    """Nested or flat."""
    try:
        values = np.asarray(tensor.data)
    except (ValueError, OverflowError):
        raise TensorInvalid(f"`data` of input {PIXELS!r} is ragged, or no tensor at all") from None
    if values.dtype.kind not in "iuf":
        raise TensorInvalid(f"`data` of input {PIXELS!r} holds something that is no number")
    if values.shape not in (shape, (math.prod(shape),)):
        raise TensorInvalid(
            f"`data` of input {PIXELS!r} has the shape {list(values.shape)}; `shape` says {list(shape)}: "
            "nest it like that, or send one flat list"
        )
    return values


def _pictures(tensor: Input, behind: bytes, max_images: int) -> list[Picture]:
    """Encoded pictures [N] or [N, 1]: as they are, or in JSON as base64."""
    shape = tensor.shape
    if tensor.datatype != "BYTES":
        raise TensorInvalid(f"input {PICTURES!r} is {tensor.datatype[:20]!r}; it must be BYTES: encoded pictures")
    if len(shape) not in (1, 2) or shape[1:] not in ([], [1]):
        raise TensorInvalid(f"input {PICTURES!r} has the shape {shape}; it must be [N] or [N, 1]")
    count = _count(shape[0], max_images)
    if tensor.data is not None:
        found: list[Picture] = _from_base64(tensor.data)
    else:
        found = list(islice(_strings(behind), count + 1))  # of millions of empty ones no more than tells it
    if len(found) != count:
        held = len(found) if len(found) < count else f"more than {count}"
        raise TensorInvalid(f"input {PICTURES!r} holds {held} pictures; its shape says {count}")
    return found


def _from_base64(data: list[Any]) -> list[Picture]:
    texts = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in data]
    if not all(isinstance(text, str) for text in texts):
        raise TensorInvalid(f"`data` of input {PICTURES!r} must hold pictures as base64")
    return [from_base64(text) for text in texts]


def _strings(behind: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(behind):
        end = place + 4 + int.from_bytes(behind[place : place + 4], "little")
        if end > len(behind) or place + 4 > len(behind):
            raise TensorInvalid(f"input {PICTURES!r} ends within a picture: a length says more than there is")
        yield behind[place + 4 : end]
        place = end


def _count(count: int, max_images: int) -> int:
    if count < 1:
        raise NoImages("the shape says that there is no picture in the request")
    if count > max_images:
        raise TooManyImages(
            f"{count} pictures in one request; the limit is {max_images}: send several requests", limit=max_images
        )
    return count


def _not_empty(body: bytes) -> bytes:
    if not body:
        raise NoImages("the body is empty; with Inference-Header-Content-Length: 0 it is one encoded picture")
    return body


# --- from rows to bytes ---


def write(question: Question, manifest: Manifest, rows: Sequence[Row]) -> Message:
    """The outputs that are asked for, of each row. Raises TensorInvalid for one that there isn't."""
    all_binary = question.parameters.binary_data_output
    descriptions, behind = [], []
    for wanted in question.outputs or [Output(name=name) for name in OUTPUT_TYPES]:
        description, values = _output(wanted, rows)
        is_binary = wanted.parameters.binary_data
        if all_binary if is_binary is None else is_binary:
            content = values.tobytes() if isinstance(values, np.ndarray) else _lengths_and(values)
            behind.append(content)
            description["parameters"] = {"binary_data_size": len(content)}
        elif isinstance(values, np.ndarray):
            description["data"] = values.ravel().tolist()
        else:
            description["data"] = [text.decode() for text in values]
        descriptions.append(description)
    head = {"model_name": manifest.model, "model_version": manifest.version}
    head |= {"id": question.id} if question.id is not None else {}
    json = to_json(head | {"outputs": descriptions})
    return Message(b"".join([json, *behind]), len(json) if behind else None)


def _check_outputs(question: Question) -> None:
    """Raises TensorInvalid."""
    names = [output.name for output in question.outputs]
    for output in question.outputs:
        if output.name not in OUTPUT_TYPES:
            raise TensorInvalid(f"there is no output {output.name[:80]!r}; there is {', '.join(OUTPUT_TYPES)}")
        if names.count(output.name) > 1:
            raise TensorInvalid(f"output {output.name!r} is asked for twice")
        if output.name == LABEL and output.parameters.classification is not None:
            raise TensorInvalid(f"`classification` is for the outputs {PROBABILITIES} and {LOGITS}, not for {LABEL}")


def _output(wanted: Output, rows: Sequence[Row]) -> tuple[dict[str, Any], NDArray[np.float32] | Strings]:
    if best := wanted.parameters.classification:
        texts = [text for row in rows for text in _best(wanted.name, row, best)]
        return _describe(wanted.name, "BYTES", [len(rows), len(texts) // len(rows)]), texts
    if wanted.name == LABEL:
        labels = [ranking.classes[ranking.order[row, 0]].encode() for ranking, row in rows]
        return _describe(LABEL, "BYTES", [len(rows), 1]), labels
    values = np.array([_values(wanted.name, row) for row in rows])  # [N, K]
    return _describe(wanted.name, "FP32", list(values.shape)), values


def _values(name: str, row: Row) -> NDArray[np.float32]:
    ranking, place = row
    return (ranking.logits if name == LOGITS else ranking.chances)[place].astype("<f4")


def _best(name: str, row: Row, count: int) -> Strings:
    """`value:index:label` of the best classes, the extension's form."""
    ranking, place = row
    values = _values(name, row)
    return [
        f"{values[index]:f}:{index}:{ranking.classes[index]}".encode()
        for index in ranking.order[place, :count].tolist()
    ]


def _describe(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _lengths_and(strings: Strings) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in strings)
