"""Every campaign that cannot run, or cannot go on, says so in one message and loses nothing."""

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from escape_inference.conditions import aggregate
from escape_inference.errors import InputError
from escape_inference.trainers import parts as parts_module
from escape_inference.trainers import storage
from escape_inference.trainers.collect import collect
from escape_inference.trainers.datasets import load_data

STUDY = """
[data]
name = "linear_regression"
samples = 300
[network]
name = "linear"
[[minima]]
label = "m"
learning_rate = 0.1
batch_size = 30
steps = 50
polish_steps = 50
polish_learning_rate = 0.5
[[escape]]
learning_rate = [0.1, 0.2]
batch_size = 2
threshold = 1.3
replicas = 8
steps = 200
looks = "exact"
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("reference")
    (folder / "study.toml").write_text(STUDY, encoding="utf-8")
    return pd.read_parquet(collect(folder / "study.toml", folder / "out", progress=False))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise AssertionError("training began before the study was checked")

    monkeypatch.setattr(parts_module, "train_minimum", fail)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Act as an ordinary user, since root may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size = 30", "batch_size = 301", r"\[\[minima\]\]: m: batch_size = 301 is more than the 300 samples"),
        ("batch_size = 2", "batch_size = [2, 999]", r"\[\[escape\]\]: m η=0.1 B=999 .*is more than the 300 samples"),
        (
            "samples = 300",
            "sample = 300",
            "data: linear_regression: unknown option sample; allowed: samples, dimension",
        ),
        ('"linear"', '"convolution"', "network: unknown name 'convolution'; use multilayer_perceptron, linear"),
        ('"linear_regression"\nsamples = 300', '"spoiled_data:nan"', "targets hold 1 NaN or infinite value"),
        ('"linear"', '"spoiled_network:column"', r"predictions of shape \(300, 1\) .* the targets have shape \(300,\)"),
        (
            "[data]",
            'loss = "huber"\n[data]',
            "loss = 'huber': must be 'mean_square', 'logistic', 'cross_entropy' or an import path",
        ),
        ("[data]", 'loss = "math:pi"\n[data]', "loss = 'math:pi': is a float, not a function"),
        ("[data]", 'loss = "spoiled_network:index"\n[data]', "the loss does not accept this data: IndexError"),
        ("[[minima]]", "[hessian]\nsubsample = 301\n[[minima]]", "subsample = 301 is more than the 300 samples"),
        ('looks = "exact"', 'looks = "screened"', "looks = 'screened' needs at least 1024 samples, the data have 300"),
        ("replicas = 8", 'replicas = 8\noptimizer = { name = "lbfgs" }', "optimizer: cannot make a step from the grad"),
        (
            "replicas = 8",
            'replicas = 8\noptimizer = { name = "sgd", momentum = "high" }',
            "optimizer: cannot make a step from the gradient: TypeError",
        ),
    ],
)
def test_a_bad_study_is_refused_before_any_training(
    tmp_path: Path, study: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "spoiled_data.py").write_text(
        "import numpy as np\ndef nan():\n    return np.ones((3, 1)), np.array([0, np.nan, 1])\n"
    )
    (tmp_path / "spoiled_network.py").write_text(
        "import jax\ncolumn = (lambda key: jax.random.normal(key, (1, 1)), lambda params, x: x @ params)\n"
        "def index(prediction, target):\n    return [prediction][7]\n"
    )
    assert old in STUDY
    study.write_text(STUDY.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        collect(study, tmp_path / "out", progress=False)
    assert str(caught.value).startswith(str(study))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_training")
def test_no_permission_to_write_is_refused_before_any_training() -> None:
    with tempfile.TemporaryDirectory() as place:
        opened, closed = Path(place), Path(place) / "closed"
        opened.chmod(0o755)
        (opened / "study.toml").write_text(STUDY, encoding="utf-8")
        closed.mkdir(mode=0o555)
        with without_privileges(), pytest.raises(InputError, match="cannot write: Permission denied"):
            collect(opened / "study.toml", closed / "out", progress=False)
        assert not list(closed.iterdir())


@pytest.mark.usefixtures("no_training")
def test_an_output_that_is_a_file_is_refused(study: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        collect(study, study, progress=False)
    with pytest.raises(InputError, match="not a folder"):
        collect(study, study / "out", progress=False)


def test_an_existing_campaign_is_never_overwritten(study: Path, reference: pd.DataFrame) -> None:
    output = study.parent / "out"
    path = collect(study, output, progress=False)
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    with pytest.raises(InputError, match="already holds a campaign; go on with it by --resume"):
        collect(study, output, progress=False)
    study.write_text(STUDY.replace("threshold = 1.3", "threshold = 1.4"), encoding="utf-8")
    with pytest.raises(InputError, match="cannot resume: the study changed since this campaign began"):
        collect(study, output, resume=True, progress=False)
    study.write_text(STUDY, encoding="utf-8")
    with pytest.raises(InputError, match="cannot resume: the study changed"):
        collect(study, output, resume=True, seed=9, progress=False)
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*")} == before
    pd.testing.assert_frame_equal(pd.read_parquet(path), reference)


@pytest.mark.usefixtures("no_training")
def test_a_folder_with_other_files_is_refused(study: Path) -> None:
    output = study.parent / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty, or give another folder"):
        collect(study, output, progress=False)
    with pytest.raises(InputError, match=r"no readable campaign.json"):
        collect(study, output, resume=True, progress=False)
    assert [entry.name for entry in output.iterdir()] == ["thesis.txt"]


def test_data_that_changed_are_refused_on_resume(study: Path) -> None:
    numbers = study.parent / "numbers.npy"
    (study.parent / "data_in_a_file.py").write_text(
        "import numpy as np\nfrom pathlib import Path\n"
        "def data():\n    x = np.load(Path(__file__).parent / 'numbers.npy')\n    return x[:, :1], x[:, 1]\n"
    )
    np.save(numbers, np.random.default_rng(1).standard_normal((100, 2)))
    study.write_text(STUDY.replace('"linear_regression"\nsamples = 300', '"data_in_a_file:data"'), encoding="utf-8")
    collect(study, study.parent / "out", progress=False)
    np.save(numbers, np.random.default_rng(2).standard_normal((100, 2)))
    with pytest.raises(InputError, match="cannot resume: the data changed since this campaign began"):
        collect(study, study.parent / "out", resume=True, progress=False)


def test_a_network_that_was_edited_is_refused_on_resume(study: Path) -> None:
    module = study.parent / "network_in_a_file.py"
    text = "import jax\nnetwork = (lambda key: jax.random.normal(key, (1,)), lambda w, x: x @ w)\n"
    module.write_text(text)
    study.write_text(STUDY.replace('name = "linear"', 'name = "network_in_a_file:network"'), encoding="utf-8")
    collect(study, study.parent / "out", progress=False)
    module.write_text(text.replace("x @ w", "2.0 * x @ w"))
    with pytest.raises(InputError, match="cannot resume: the network or loss changed since this campaign began"):
        collect(study, study.parent / "out", resume=True, progress=False)


def test_modules_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_name.py").write_text(f"def data():\n    return [[{value}], [0.5]], [0.0, 1.0]\n")
    found = [load_data("same_name:data", folder=tmp_path / name).inputs[0, 0] for name in ("one", "two", "one")]
    assert found == [1.0, 2.0, 1.0]


def test_a_condition_that_cannot_be_measured_does_not_lose_the_others(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study.parent / "exact_fit.py").write_text(
        "import numpy as np\ndef data(noise=1.0):\n    r = np.random.default_rng(0)\n"
        "    x = r.normal(size=(300, 1))\n    return x, noise * r.normal(size=300)\n"
    )
    text = STUDY.replace('"linear_regression"\nsamples = 300', '"exact_fit:data"')
    text = text.replace('label = "m"', 'label = "n{noise}"\ndata = { noise = [0.0, 1.0] }').replace(
        "steps = 50\n", "steps = 5000\n"
    )
    study.write_text(text, encoding="utf-8")
    path = collect(study, study.parent / "out", progress=False)
    conditions = pd.read_csv(study.parent / "out" / "conditions.csv")
    assert conditions.groupby("minimum")["status"].unique().str[0].to_dict() == {"n0.0": "failed", "n1.0": "measured"}
    assert set(pd.read_parquet(path)["minimum"]) == {"n1.0"}
    told = capsys.readouterr().err
    assert "n0.0 η=0.1 B=2 c=1.3 quasi_stationary: failed: loss_barrier: 0 must be finite and above" in told


def test_steps_made_in_different_ways_are_different_conditions(study: Path) -> None:
    second = STUDY[STUDY.index("[[escape]]") :]
    third = second.replace('looks = "exact"', 'looks = "exact"\noptimizer = { name = "sgd", momentum = 0.5 }')
    study.write_text(STUDY + second + "with_replacement = false\n" + third, encoding="utf-8")
    table = pd.read_parquet(collect(study, study.parent / "out", progress=False))
    assert set(table["optimizer"]) == {"sgd", "sgd momentum=0.5"}
    assert set(table["with_replacement"]) == {True, False}
    frame = aggregate(table).frame
    assert len(frame) == 6
    assert frame["escapes"].sum() == table["escaped"].sum()
    assert frame["condition"].is_unique
    named = pd.read_csv(study.parent / "out" / "conditions.csv")["condition"]
    assert named.is_unique
    assert named.str.endswith("without replacement").sum() == named.str.endswith("sgd momentum=0.5").sum() == 2


def test_a_loss_of_ones_own_may_compare_scores_with_labels(study: Path) -> None:
    (study.parent / "classes.py").write_text(
        "import jax, numpy as np\ndef data():\n    r = np.random.default_rng(0)\n"
        "    x = r.normal(size=(300, 2))\n    return x, (x[:, 0] + r.normal(size=300) > 0).astype(float)\n"
        "scores = (lambda key: jax.random.normal(key, (2, 3)), lambda w, x: x @ w)\n"
        "def loss(score, label):\n    return -jax.nn.log_softmax(score)[label.astype(int)]\n"
    )
    text = STUDY.replace('"linear_regression"\nsamples = 300', '"classes:data"').replace('"linear"', '"classes:scores"')
    text = text.replace("threshold = 1.3", "threshold = 1.05").replace("[0.1, 0.2]", "[0.3, 0.5]")
    study.write_text('loss = "classes:loss"\n' + text, encoding="utf-8")
    collect(study, study.parent / "out", progress=False)
    assert pd.read_csv(study.parent / "out" / "minima.csv")["loss_minimum"].between(0.4, 0.9).all()


@pytest.mark.usefixtures("no_training")
def test_two_processes_cannot_work_on_one_campaign(study: Path) -> None:
    content = {"identity": {"study": "x"}}
    with (
        storage.open_campaign(study.parent / "out", content, resume=False),
        pytest.raises(InputError, match="another process is working"),
        storage.open_campaign(study.parent / "out", content, resume=True),
    ):
        pass


@pytest.mark.parametrize("write", (1, 3, 6, 8, 10, 13))
def test_a_disk_that_fills_up_at_any_write_loses_nothing(
    study: Path, reference: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    output, real, count = study.parent / "out", storage._flush, [0]

    def full(path: Path) -> None:
        count[0] += 1
        if count[0] == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)

    monkeypatch.setattr(storage, "_flush", full)
    with pytest.raises(InputError, match="cannot write: No space left on device") as caught:
        collect(study, output, progress=False)
    kept = {folder.name for folder in (output / "parts").iterdir()}
    assert not any(name.startswith(".") for name in kept), "no half-written part"
    assert (f"{len(kept)} finished parts are kept, go on with --resume" in str(caught.value)) == bool(kept)
    measured: list[Any] = []
    monkeypatch.setattr(storage, "_flush", real)
    monkeypatch.setattr(parts_module, "measure_escape", _counted(parts_module.measure_escape, measured))
    path = collect(study, output, resume=True, progress=False)
    assert len(measured) == 2 - sum(name.startswith("condition") for name in kept)
    pd.testing.assert_frame_equal(pd.read_parquet(path), reference)


def _counted(function: Any, calls: list[Any]) -> Any:
    def wrapper(*args: Any, **settings: Any) -> Any:
        calls.append(settings)
        return function(*args, **settings)

    return wrapper


def test_a_real_limit_on_file_size_is_reported_and_survived(study: Path, reference: pd.DataFrame) -> None:
    output = study.parent / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write: .*File too large"):
            collect(study, output, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    pd.testing.assert_frame_equal(pd.read_parquet(collect(study, output, resume=True, progress=False)), reference)
