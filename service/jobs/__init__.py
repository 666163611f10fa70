"""Data sets and what is done with them; knows no FastAPI and no torch."""
