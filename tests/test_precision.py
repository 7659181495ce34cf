"""Inference neither inherits nor changes the settings of the user's own code."""

from threadpoolctl import threadpool_info, threadpool_limits

from escape_inference.precision import float64


def threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_linear_algebra_has_one_thread_inside_and_as_many_as_before_outside() -> None:
    with threadpool_limits(2, "blas"):
        before = threads()
        assert float64(lambda: (float64(threads)(), threads()))() == ({1}, {1})
        assert threads() == before
