"""Plain FastAPI, as most people write it: one picture a forward pass, no batching across requests."""

from fastapi import FastAPI, UploadFile
from workload import Classifier, decode

app = FastAPI()
classifier = Classifier()


@app.post("/predict")
def predict(file: UploadFile) -> dict:
    return classifier.predict([decode(file.file.read())])[0]


@app.post("/predict_batch")
def predict_batch(files: list[UploadFile]) -> list[dict]:
    return classifier.predict([decode(file.file.read()) for file in files])
