"""The random numbers of attacks on parts of a data set."""

import hashlib


def chunk_seed(seed: int, attack: str, chunk_index: int) -> int:
    """Mix a 32-bit seed for one attack on one chunk; the same on every machine."""
    digest = hashlib.sha256(f'{seed}/{attack}/{chunk_index}'.encode()).digest()
    return int.from_bytes(digest[:4], 'little')
