"""Make Megatron's IndexedDataset (.bin and .idx) of real text, one token per byte.

    python examples/megatron_gpt/prepare.py --output build/corpus

The text is that of the DeepSpeed example: Python's standard library, or a file or
folder of your own. A document is a piece of 16 KiB.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deepspeed_gpt"))

import numpy  # noqa: E402
import torch  # noqa: E402
from megatron.core.datasets.indexed_dataset import (  # noqa: E402
    IndexedDatasetBuilder,
)

from corpus import CorpusError, load_text  # noqa: E402

DOCUMENT_BYTES = 16 << 10


def prepare(output: Path, data: Path | None = None) -> int:
    """Write ``output``.bin and ``output``.idx; return the number of documents."""
    text = numpy.frombuffer(load_text(data), dtype=numpy.uint8)
    output.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=numpy.uint16)
    documents = [
        text[begin : begin + DOCUMENT_BYTES]
        for begin in range(0, len(text), DOCUMENT_BYTES)
    ]
    for document in documents:
        builder.add_document(torch.tensor(document.astype(int)), [len(document)])
    builder.finalize(f"{output}.idx")
    return len(documents)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="path without .bin")
    parser.add_argument("--data", type=Path, help="a file or folder of text")
    args = parser.parse_args()
    try:
        count = prepare(args.output, args.data)
    except CorpusError as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}.bin and .idx: {count} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
