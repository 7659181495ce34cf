"""The study file: every slip is one clear message, and the grids are written out in full."""

from pathlib import Path

import numpy as np
import pytest

from escape_inference.cli import app
from escape_inference.errors import InputError
from escape_inference.trainers import schema
from escape_inference.trainers.specs import derived_seed, describe
from escape_inference.trainers.study import read_study

GOOD = """
seed = 3
[data]
name = "linear_regression"
samples = 200
dimension = 2
[network]
name = "linear"
[[minima]]
label = "m{learning_rate}"
learning_rate = [0.1, 0.2]
batch_size = 20
steps = 50
[[escape]]
learning_rate = [0.1, 0.3]
batch_size = 2
threshold = [1.5, 2]
replicas = 8
steps = 100
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_grids_are_written_out_minimum_by_minimum(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, GOOD))
    assert [spec.label for spec in study.minima] == ["m0.1", "m0.2"]
    assert len(study.conditions) == 2 * 2 * 2
    assert describe(study.conditions[1]) == "m0.1 η=0.1 B=2 c=2 quasi_stationary"
    assert describe(study.conditions[-1]) == "m0.2 η=0.3 B=2 c=2 quasi_stationary"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("replicas = 8", "replica = 8", r"\[\[escape\]\] number 1: unknown key replica \(did you mean replicas\?\)"),
        ("seed = 3", "sed = 3", r"unknown key sed \(did you mean seed\?\); allowed: title, seed, loss"),
        (
            "learning_rate = [0.1, 0.2]",
            "learning_rate = -0.1",
            r"\[\[minima\]\] number 1: learning_rate = -0.1: must be gre",
        ),
        (
            "learning_rate = [0.1, 0.3]",
            "learning_rate = [0.1, -3.0]",
            r"number 1: learning_rate = -3.0: must be greater",
        ),
        ("learning_rate = [0.1, 0.3]", "learning_rate = nan", "learning_rate = nan"),
        ("learning_rate = [0.1, 0.3]", "learning_rate = []", "learning_rate"),
        ("learning_rate = [0.1, 0.3]", "", "either learning_rate or temperature"),
        ("learning_rate = [0.1, 0.3]", "learning_rate = 0.1\ntemperature = 0.1", "either learning_rate or temperature"),
        ("learning_rate = [0.1, 0.2]", 'learning_rate = "fast"', "learning_rate = 'fast': must be a valid number"),
        ("batch_size = 20", "batch_size = 20.5", "batch_size = 20.5: must be a valid integer"),
        ("batch_size = 20", "batch_size = true", "batch_size = True: must be a valid integer"),
        ("batch_size = 20", "batch_size = 0", "batch_size = 0: must be greater than or equal to 1"),
        ("threshold = [1.5, 2]", "threshold = 1.0", "threshold = 1.0: must be greater than 1"),
        ("threshold = [1.5, 2]", "", "threshold is required"),
        ("replicas = 8", "replicas = 1", "replicas = 1: must be greater than or equal to 2"),
        ("steps = 100", "steps = 100\ncheck_interval = 101", "check_interval = 101 is longer than steps = 100"),
        ("steps = 100", "steps = 100\nburn_in = [9, 3]", "burn_in = .9, 3. must be .minimum, maximum."),
        ("steps = 100", 'steps = 100\nstart = "here"', "start = 'here': must be 'quasi_stationary' or 'minimum'"),
        ("steps = 100", 'steps = 100\nminima = "x*"', "minima = 'x.' matches none of: m0.1, m0.2"),
        ('label = "m{learning_rate}"', 'label = "m"', "two minima have the label m; name what differs"),
        ('label = "m{learning_rate}"', 'label = "m{rate}"', "can use {...} of: samples, dimension, learning_rate"),
        ("steps = 50", "steps = 50\ndata = { dimension = [] }", "leaves nothing to train on"),
        ("learning_rate = [0.1, 0.2]", "learning_rate = [0.1, 0.1]", "m0.1 and m0.1 are the same minimum twice"),
        ("threshold = [1.5, 2]", "threshold = [2, 2.0]", "this condition occurs twice: m0.1"),
        ("[[escape]]", "[escape]", r"write this section with double brackets, \[\[escape\]\]"),
        ('name = "linear"\n', "", r"\[network\]: name is required"),
        ("steps = 100", 'steps = 100\noptimizer = "adam"', "optimizer = 'adam': must be a table such as { name"),
        ("steps = 100", "steps = 100\nburn_in = [5]", r"burn_in = \[5\]: must be a pair, \[minimum, maximum\]"),
        ("steps = 100", 'steps = 100\nlooks = "screened"\ncheck_interval = 2', "looks at every iteration"),
        ('label = "m{learning_rate}"', 'label = ""', "label = ''"),
        ('label = "m{learning_rate}"', 'label = "{learning_rate.x}"', "can use {...} of"),
        ("seed = 3", "seed = 3 4", "not valid TOML"),
    ],
)
def test_a_slip_is_named_with_file_key_and_rule(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        read_study(path)
    assert str(caught.value).startswith(str(path))


RAMP = """
[[ramps]]
learning_rate = [0.1, 0.3]
levels = 4
steps_per_level = 30
batch_size = [2, 3]
threshold = 5.0
runs = 8
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("runs = 8", "run = 8", r"\[\[ramps\]\] number 1: unknown key run \(did you mean runs\?\)"),
        ("runs = 8", "runs = 0", "runs = 0: must be greater than or equal to 1"),
        ("levels = 4", "levels = 1", "levels = 1: must be greater than or equal to 2"),
        ("[0.1, 0.3]", "[0.3, 0.1]", r"learning rates must be \[lowest, highest\], got \[0.3, 0.1\]"),
        ("[0.1, 0.3]", "[-0.1, 0.1]", "learning_rate = -0.1: must be greater than 0"),
        ("learning_rate = [0.1, 0.3]", "", "either learning_rate = .lowest, highest. or relative"),
        ("threshold = 5.0", "", "either threshold .* or jump_factor"),
        ("threshold = 5.0", "jump_factor = 1.0", "jump_factor = 1.0: must be greater than 1"),
        ("steps_per_level = 30", "steps_per_level = 30\ncheck_interval = 7", "check_interval = 7 must divide"),
        ("levels = 4", 'levels = 4\nspacing = "square"', "spacing = 'square': must be 'geometric' or 'linear'"),
        ("levels = 4", 'levels = 4\nminima = "x*"', r"\[\[ramps\]\] number 1: minima = 'x.' matches none of: m0.1"),
        ("batch_size = [2, 3]", "batch_size = [2, 2]", "this ramp occurs twice: m0.1 ramp η=0.1-0.3 B=2 c=5"),
        ("[[ramps]]", "[ramps]", r"write this section with double brackets, \[\[ramps\]\]"),
    ],
)
def test_a_slip_in_a_ramp_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RAMP
    with pytest.raises(InputError, match=message):
        read_study(write(tmp_path, GOOD + RAMP.replace(old, new, 1)))


def test_ramps_are_written_out_for_every_minimum_and_change_the_study(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, GOOD + RAMP))
    assert [describe(spec) for spec in study.ramps][:2] == [
        "m0.1 ramp η=0.1-0.3 B=2 c=5",
        "m0.1 ramp η=0.1-0.3 B=3 c=5",
    ]
    assert len(study.ramps) == 4
    assert study.ramps[0].learning_rates_at(7.0) == pytest.approx(0.1 * 3 ** (np.arange(4) / 3))
    assert read_study(write(tmp_path, GOOD)).identity != study.identity
    relative = RAMP.replace("learning_rate = [0.1, 0.3]", 'relative = [0.2, 1.4]\nspacing = "linear"')
    ramp = read_study(write(tmp_path, GOOD + relative)).ramps[0]
    assert ramp.learning_rates_at(8.0) == pytest.approx([0.05, 0.15, 0.25, 0.35])


def test_a_study_that_measures_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at least one \[\[escape\]\] or \[\[ramps\]\] or \[\[saddles\]\]"):
        read_study(write(tmp_path, GOOD[: GOOD.index("[[escape]]")]))


def test_several_slips_are_listed_together(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("replicas = 8", "replicas = 0").replace("steps = 50", "steps = 0"))
    with pytest.raises(InputError) as caught:
        read_study(path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_study_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the study: No such file"):
        read_study(tmp_path / "none.toml")
    with pytest.raises(InputError, match="cannot read the study: Is a directory"):
        read_study(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_study(tmp_path / "bytes.toml")


def test_comments_and_title_do_not_change_a_study_but_values_do(tmp_path: Path) -> None:
    plain = read_study(write(tmp_path, GOOD)).identity
    assert read_study(write(tmp_path, "# a remark\ntitle = 'new'\n" + GOOD)).identity == plain
    assert read_study(write(tmp_path, GOOD.replace("steps = 100", "steps = 101"))).identity != plain
    assert read_study(write(tmp_path, GOOD), seed=4).identity != plain
    assert read_study(write(tmp_path, GOOD), seed=3).identity == plain


def test_seeds_depend_on_content_and_not_on_order(tmp_path: Path) -> None:
    forward = {describe(spec): spec.identity for spec in read_study(write(tmp_path, GOOD)).conditions}
    turned = (
        GOOD.replace("[0.1, 0.2]", "[0.2, 0.1]").replace("[0.1, 0.3]", "[0.3, 0.1]").replace("[1.5, 2]", "[2, 1.5]")
    )
    backward = {describe(spec): spec.identity for spec in read_study(write(tmp_path, turned)).conditions}
    assert forward == backward
    assert len(set(forward.values())) == len(forward)
    seeds = {derived_seed({"a": value}, purpose) for value in range(50) for purpose in ("training", "escape")}
    assert len(seeds) == 100


def test_temperature_gives_the_learning_rate_at_each_minimum(tmp_path: Path) -> None:
    text = GOOD.replace("learning_rate = [0.1, 0.3]", "temperature = 0.05")
    condition = read_study(write(tmp_path, text)).conditions[0]
    assert condition.learning_rate_at(4.0) == 0.025
    assert condition.learning_rate_at(12.0) == 0.00833
    assert describe(condition) == "m0.1 T=0.05 B=2 c=1.5 quasi_stationary"


def test_options_of_the_data_can_be_a_grid_of_the_minima(tmp_path: Path) -> None:
    text = GOOD.replace('label = "m{learning_rate}"', 'label = "d{dimension}"\ndata = { dimension = [1, 3] }')
    study = read_study(write(tmp_path, text.replace("learning_rate = [0.1, 0.2]", "learning_rate = 0.1")))
    assert [spec.label for spec in study.minima] == ["d1", "d3"]
    assert [spec.data_options for spec in study.minima] == [{"samples": 200, "dimension": d} for d in (1, 3)]


@pytest.mark.parametrize(
    "name", ["quick", "kills", "campaign", "linear_regression", "mnist_two_class", "mnist_minima", "saddles"]
)
def test_the_studies_that_ship_are_valid(name: str) -> None:
    study = read_study(Path(__file__).parent.parent / "scripts" / "studies" / f"{name}.toml")
    assert study.measured


def test_every_key_is_explained_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        app(["collect", "--keys"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for section, model in schema.SECTIONS.items():
        for name, field in model.model_fields.items():
            if section not in ("data", "network"):
                assert field.description and f"{field.description}" in text, (section, name)
    assert 'escape_direction = "top"' in text


def test_the_seed_of_the_data_can_stand_in_a_label(tmp_path: Path) -> None:
    text = GOOD.replace(
        'label = "m{learning_rate}"', 'label = "m{learning_rate}_{data_seed}"\ndata = { seed = [0, 1] }'
    )
    labels = [spec.label for spec in read_study(write(tmp_path, text)).minima]
    assert labels == ["m0.1_0", "m0.2_0", "m0.1_1", "m0.2_1"]
