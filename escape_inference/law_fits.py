"""Whether a second fit of a law compiles anything: what makes hundreds of fits of one law affordable."""

import jax

from escape_inference.inference import infer
from escape_inference.law import Law
from escape_inference.simulation import default_parameters, simulate
from escape_inference.worlds import World, make_design

RUNS = 15  # of a condition: fewer than the escape check grades, so that every table leads to arrays of the same shapes
_compilations = 0
_listening = False


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    global _compilations
    # programs lowered, since one that a cache on disk holds is never compiled
    _compilations += event.endswith("jaxpr_to_mlir_module_duration")


def second_fit(law: Law, seed: int = 0) -> tuple[bool, str, str]:
    """Fit simulated tables of equal shape until a fit compiles nothing: the second must, or at the latest the third.

    (The third, since a sampler that did not converge is run again for longer, which a second table may be the first to need.)

    Returns:
        Whether it passed, what was found, and a remedy.
    """
    global _listening
    if not _listening:
        jax.monitoring.register_event_duration_secs_listener(_count)
        _listening = True
    barrier = law.barriers[0]
    design = make_design(World(barrier=barrier, dimension=3), minima=4, learning_rates=2, runs=RUNS, seed=2)
    values = default_parameters(law, design)
    compiled = []
    for number in range(3):
        table = simulate(law, design, values, seed=seed + number)
        before = _compilations
        infer(law, table, seed=seed, draws=100, warmup=100, chains=2)
        compiled.append(_compilations - before)
        if number and not compiled[-1]:
            return True, "it compiles nothing", ""
    return (
        False,
        f"the second fit compiled {compiled[1]} programs and the third {compiled[2]}",
        "Keep the functions of the law at the top level of its file: a lambda or a closure that is made anew is a new law",
    )
