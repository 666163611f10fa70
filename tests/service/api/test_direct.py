import pytest
from fastapi import APIRouter, Request, Response
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from service.api.direct import Direct
from service.api.middleware import Observe
from service.errors import ModelNotFound


async def fastapi(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("FastAPI's")(scope, receive, send)


@pytest.fixture
def client() -> TestClient:
    router = APIRouter()

    @router.post("/models/{model}/ask")
    async def ask(request: Request) -> Response:
        model = request.path_params["model"]
        if model == "none":
            raise ModelNotFound(f"there is no model {model!r}; there is a")
        return PlainTextResponse(f"{model} at {request.scope['route'].path}")

    return TestClient(Observe(Direct(fastapi, router.routes)))


def test_a_route_of_its_own_is_answered_without_fastapi(client: TestClient) -> None:
    assert client.post("/models/a/ask").text == "a at /models/{model}/ask"


def test_other_paths_and_methods_are_fastapi_s(client: TestClient) -> None:
    asked = [client.get("/models/a/ask"), client.post("/models/a/ask/"), client.post("/models/a")]
    assert [response.text for response in asked] == ["FastAPI's"] * 3


def test_what_its_endpoint_refuses_is_a_problem(client: TestClient) -> None:
    response = client.post("/models/none/ask")
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
    assert (response.json()["code"], response.json()["detail"]) == (
        "model_not_found",
        "there is no model 'none'; there is a",
    )
