"""What a route does with an archive that comes in."""

from collections.abc import AsyncIterator

from service.jobs.datasets import DatasetRecord, DatasetStore


async def receive(
    store: DatasetStore, chunks: AsyncIterator[bytes], *, model: str | None = None, filename: str = ""
) -> DatasetRecord:
    """Receive one archive and check it."""
    async with store.uploading() as upload:
        await upload.begin_archive(filename)
        async for chunk in chunks:
            await upload.write(chunk)
        return await store.check(upload, model=model)
