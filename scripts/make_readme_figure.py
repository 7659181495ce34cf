"""Draw the picture of README.md from the results of the comparison that it shows.

escape-inference compare data/mnist_two_class.csv --laws power_law,arrhenius --output results
python scripts/make_readme_figure.py results
"""

import sys
from pathlib import Path

import arviz_base  # noqa: F401  (registers what reading a posterior needs)
import xarray as xr

from escape_inference.report import rates_figure

PICTURE = Path(__file__).resolve().parents[1] / "data" / "mnist_two_class_rates.png"


def main(folder: Path) -> None:
    """Draw measured rates against both laws."""
    names = ("power_law", "arrhenius")
    trees = {name: xr.open_datatree(folder / f"{name}.nc", engine="netcdf4") for name in names}
    rates_figure(trees).savefig(PICTURE, dpi=90)
    print(PICTURE)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
