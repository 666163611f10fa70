"""An MLServer runtime: V2 JSON with one BYTES tensor [n, 1] of pictures in base64."""

import base64

from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, Parameters, ResponseOutput
from workload import CLASSES, Classifier, decode


class Peer(MLModel):
    async def load(self) -> bool:
        self.classifier = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        data = payload.inputs[0].data
        pictures = [decode(base64.b64decode(item)) for item in getattr(data, "root", data)]
        chances = self.classifier.probabilities(pictures)  # [n, K]
        label = ResponseOutput(
            name="label",
            shape=[len(chances), 1],
            datatype="BYTES",
            parameters=Parameters(content_type="str"),
            data=[CLASSES[int(row.argmax())] for row in chances],
        )
        probabilities = ResponseOutput(
            name="probabilities",
            shape=list(chances.shape),
            datatype="FP32",
            parameters=Parameters(content_type="np"),
            data=chances.ravel().tolist(),
        )
        return InferenceResponse(model_name=self.name, outputs=[label, probabilities])
