"""Which sizes batches have. Each takes the engine memory, and time when it first comes, so there are few."""

FEW = 8  # pictures, up to which any number will do


def size_within(images: int) -> int:
    """The largest size that is no more than so many: beyond a few, a power of two."""
    return images if images <= FEW else 1 << (images.bit_length() - 1)


def sizes(most: int) -> list[int]:
    """All of them up to `most`, ascending."""
    return [size for size in range(1, most + 1) if size_within(size) == size]
