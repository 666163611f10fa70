"""Everything that knows FastAPI: one router per noun, schemas, problems, middleware."""
