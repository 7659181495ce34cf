"""Training, saving and the Hessian of a minimum."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from escape_inference.errors import InputError
from escape_inference.trainers import Minimum, minimum, top_hessian, train_minimum
from escape_inference.trainers.outliers import count_outliers


def regression(samples: int = 400, dimension: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs of unequal scale, noisy targets, and the exact least-squares solution."""
    rng = np.random.default_rng(2)
    inputs = (rng.normal(size=(samples, dimension)) * np.sqrt(np.arange(1, dimension + 1))).astype(np.float32)
    targets = (inputs @ np.ones(dimension) + rng.normal(size=samples)).astype(np.float32)
    return inputs, targets, np.linalg.lstsq(inputs, targets, rcond=None)[0]


def linear(params: dict, inputs: jnp.ndarray) -> jnp.ndarray:
    return inputs @ params["weight"]


START = {"weight": jnp.zeros(5)}


@pytest.mark.parametrize("with_replacement", [True, False])
@pytest.mark.parametrize("optimizer", [None, optax.adam, optax.sgd(0.02, momentum=0.5)])
def test_sgd_and_polish_reach_the_least_squares_solution(with_replacement: bool, optimizer: object) -> None:
    inputs, targets, solution = regression()
    found = train_minimum(
        linear,
        START,
        inputs,
        targets,
        learning_rate=0.02,
        batch_size=20,
        steps=1200,
        optimizer=optimizer,
        with_replacement=with_replacement,
        polish_steps=3000,
        polish_learning_rate=0.1,
        polish_gradient_norm=2e-5,
    )
    assert found.params["weight"] == pytest.approx(solution, abs=1e-3)
    assert found.gradient_norm < 1e-4
    assert found.loss_minimum == pytest.approx(0.5 * np.mean((inputs @ solution - targets) ** 2), rel=1e-5)
    assert 0 < found.made["polish_steps"] < 3000


def test_without_polish_the_end_point_of_sgd_is_kept_as_it_is() -> None:
    inputs, targets, solution = regression()
    common: dict = {"learning_rate": 0.05, "batch_size": 4, "steps": 300}
    found = train_minimum(linear, START, inputs, targets, **common)
    again = train_minimum(linear, START, inputs, targets, **common)
    other = train_minimum(linear, START, inputs, targets, seed=1, **common)
    exact = 0.5 * np.mean((inputs @ solution - targets) ** 2)
    assert exact * 1.005 < found.loss_minimum < 3 * exact
    assert found.gradient_norm > 0.01
    assert np.array_equal(found.params["weight"], again.params["weight"])
    assert not np.array_equal(found.params["weight"], other.params["weight"])
    assert found.made["polish_steps"] == 0


def test_full_batches_without_replacement_are_gradient_descent() -> None:
    inputs, targets, _ = regression()
    found = train_minimum(
        linear, START, inputs, targets, learning_rate=0.05, batch_size=400, steps=7, with_replacement=False
    )
    theta = np.zeros(5)
    for _ in range(7):
        theta -= 0.05 * inputs.T @ (inputs @ theta - targets) / 400
    assert found.params["weight"] == pytest.approx(theta, rel=1e-4)


def test_an_epoch_without_replacement_uses_every_sample_once() -> None:
    """With one-hot inputs every sample has its own weight, and one epoch moves each by eta times its target."""
    targets = np.arange(1.0, 13.0, dtype=np.float32)
    found = train_minimum(
        linear,
        {"weight": jnp.zeros(12)},
        np.eye(12),
        targets,
        learning_rate=0.3,
        batch_size=4,
        steps=3,
        with_replacement=False,
    )
    assert found.params["weight"] == pytest.approx(0.3 / 4 * targets)


def test_progress_and_the_pieces_of_training_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets, _ = regression()
    common: dict = {"learning_rate": 0.02, "batch_size": 30, "steps": 100, "with_replacement": False}
    whole = train_minimum(linear, START, inputs, targets, **common)
    monkeypatch.setattr(minimum, "PIECE", 17)
    heard = []
    pieces = train_minimum(
        linear, START, inputs, targets, progress=lambda done, total, _: heard.append((done, total)), **common
    )
    assert np.array_equal(whole.params["weight"], pieces.params["weight"])
    assert heard == [(17, 100), (34, 100), (51, 100), (68, 100), (85, 100), (100, 100)]


def test_a_loss_of_the_users_own_is_minimised() -> None:
    inputs, targets, _ = regression()
    found = train_minimum(
        lambda params, x: jnp.broadcast_to(params, (len(x), 1)),
        jnp.zeros(()),
        inputs,
        targets,
        learning_rate=0.05,
        batch_size=400,
        with_replacement=False,
        steps=2000,
        loss=lambda prediction, target: jnp.abs(prediction[0] - target),
    )
    assert float(found.params) == pytest.approx(np.median(targets), abs=0.15)


def test_diverging_training_is_refused() -> None:
    inputs, targets, _ = regression()
    with pytest.raises(InputError, match=r"diverged.*Lower the learning rate"):
        train_minimum(linear, START, inputs, targets, learning_rate=5.0, batch_size=4, steps=500)


def test_a_saved_minimum_is_read_back_whole(tmp_path: Path) -> None:
    params = {"first": [jnp.arange(6.0).reshape(2, 3), jnp.float32(7)], "second": jnp.arange(3)}
    saved = Minimum(params, 0.125, 1e-7, {"seed": 3, "learning_rate": 0.1})
    path = saved.save(tmp_path / "minimum.npz")
    assert [item.name for item in tmp_path.iterdir()] == ["minimum.npz"]
    like = {"first": [jnp.zeros((2, 3)), jnp.zeros(())], "second": jnp.zeros(3, int)}
    loaded = Minimum.load(path, like)
    assert np.array_equal(loaded.params["first"][0], params["first"][0])
    assert float(loaded.params["first"][1]) == 7
    assert np.array_equal(loaded.params["second"], params["second"])
    assert (loaded.loss_minimum, loaded.gradient_norm, loaded.made) == (0.125, 1e-7, saved.made)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Minimum(jnp.zeros(2), 0.5, 0.0).save(tmp_path / "minimum.npz")
    before = path.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        Minimum(jnp.ones(2), 0.25, 0.0).save(path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["minimum.npz"]


def test_a_file_that_is_not_this_minimum_is_refused(tmp_path: Path) -> None:
    path = Minimum(jnp.zeros(2), 0.5, 0.0).save(tmp_path / "minimum.npz")
    with pytest.raises(InputError, match="the network has"):
        Minimum.load(path, jnp.zeros(3))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="not a saved minimum"):
        Minimum.load(path, jnp.zeros(2))
    with pytest.raises(InputError, match="not a saved minimum"):
        Minimum.load(tmp_path / "absent.npz", jnp.zeros(2))


def test_the_top_of_a_known_spectrum_is_found_with_its_residuals() -> None:
    inputs, targets, _ = regression(dimension=60)
    inputs[:, :3] *= np.array([12.0, 9.0, 7.0])
    exact = np.linalg.eigvalsh(inputs.T.astype(float) @ inputs / len(inputs))[::-1]
    spectrum = top_hessian(linear, {"weight": jnp.zeros(60)}, inputs, targets, k=6)
    assert spectrum.eigenvalues == pytest.approx(exact[:6], rel=1e-4)
    assert spectrum.converged.all()
    assert np.all(np.abs(spectrum.eigenvalues - exact[:6]) <= spectrum.residuals + 1e-4 * exact[0])
    assert spectrum.top == spectrum.eigenvalues[0]
    assert 0 < spectrum.top_se < 1e-3 * spectrum.top


def test_too_few_iterations_are_reported_as_not_converged() -> None:
    inputs, targets, _ = regression(dimension=60)
    spectrum = top_hessian(linear, {"weight": jnp.zeros(60)}, inputs, targets, k=6, iterations=6)
    assert not spectrum.converged.all()


def test_outliers_in_single_precision_have_no_ghosts() -> None:
    """Three outliers far above the rest stay three, however many iterations follow their convergence."""
    inputs, targets, _ = regression(dimension=80)
    inputs = inputs / np.sqrt(np.arange(1, 81))
    inputs[:, :3] *= np.array([300.0, 200.0, 100.0])
    spectrum = top_hessian(linear, Minimum({"weight": jnp.zeros(80)}, 1.0, 0.0), inputs, targets, k=20, iterations=75)
    exact = np.linalg.eigvalsh(inputs.T.astype(float) @ inputs / len(inputs))[::-1]
    assert spectrum.eigenvalues[:3] == pytest.approx(exact[:3], rel=1e-4)
    assert spectrum.eigenvalues[3] < 10
    assert spectrum.outliers == 3


def test_a_subsample_of_the_data_gives_its_own_hessian() -> None:
    inputs, targets, _ = regression()
    whole = top_hessian(linear, START, inputs, targets, k=1)
    half = top_hessian(linear, START, inputs, targets, k=1, subsample=200)
    assert half.top != whole.top
    assert half.top == pytest.approx(whole.top, rel=0.3)


def test_few_eigenvalues_are_counted_to_the_widest_gap_without_an_error() -> None:
    found = count_outliers(np.array([50.0, 40.0, 2.0, 1.9]))
    assert (found.count, found.bulk_edge, found.gap) == (2, 2.0, pytest.approx(20))
    assert np.isnan(found.se)
    assert count_outliers(np.array([3.0])).count == 1
    assert count_outliers(np.array([-3.0])).count == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"k": 0}, "k:"), ({"k": 6}, "k:"), ({"subsample": 401}, "subsample"), ({"iterations": 2, "k": 3}, "iterations")],
)
def test_bad_arguments_of_the_hessian_are_refused(changes: dict, message: str) -> None:
    inputs, targets, _ = regression()
    with pytest.raises(InputError, match=message):
        top_hessian(linear, START, inputs, targets, **({"k": 3} | changes))
