"""The job that is killed."""

from benchmarks import kill_resume
from sprint_jax import config
from sprint_jax.runtime import cards


def test_the_job_has_the_steps_that_are_counted():
    """Fails when an override of the job has a key that the cards no longer have."""
    card, *overrides = (flag.partition("=") for flag in kill_resume._JOB)
    pairs = [f"{key.removeprefix('--config.')}={value}" for key, _, value in overrides]
    c = config.parse(cards.load(card[2], pairs))
    steps = {name: c.phases[name].steps for name in config.active(c)}
    assert steps == kill_resume._STAGES
    assert c.run.checkpoint_every == kill_resume._EVERY
