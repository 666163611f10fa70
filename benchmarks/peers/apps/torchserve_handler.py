"""A TorchServe handler: a batch of pictures to a list of answers."""

from workload import Classifier, decode


class PeerHandler:
    def initialize(self, context: object) -> None:
        self.classifier = Classifier()

    def handle(self, data: list[dict], context: object) -> list[dict]:
        return self.classifier.predict([decode(bytes(row.get("data") or row.get("body"))) for row in data])
