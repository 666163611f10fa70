"""Fine-tuning on request: data sets, jobs and the processes that do them. Knows no FastAPI and no torch."""
