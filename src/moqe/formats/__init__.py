"""Expert files others can read: compressed-tensors folders and GGUF; and foreign checkpoints, read as they are."""

from moqe.formats.compressed_tensors import CompressedTensorsWriter, write_shared
from moqe.formats.gguf_split import merge_gguf
from moqe.formats.gguf_writer import GgufWriter
from moqe.formats.open import open_expert, same_computation, same_tokenizer

__all__ = [
    "CompressedTensorsWriter",
    "GgufWriter",
    "merge_gguf",
    "open_expert",
    "same_computation",
    "same_tokenizer",
    "write_shared",
]
