"""Bytes to answers: registry, predictor, batcher, engine. Knows no FastAPI."""
