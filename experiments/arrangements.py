"""Draw the arrangements of the shipped teacher, against which students' diversity is measured.

    python -m experiments.arrangements

Writes sprint_jax/assets/shapes_arrangements.json for both halves of the held-out captions: three
minutes on two CPU cores.
"""

import dataclasses

from sprint_jax import build, config
from sprint_jax.runtime import cards
from sprint_jax.storage import json_files
from sprint_jax.toy import shapes
from sprint_jax.training import datasets, diversity


def main() -> None:
    """Draw both halves and write the file."""
    parsed, entries = config.parse(cards.load("sprint")), []
    teacher = build.teacher_weights(parsed.teacher.pretrained, build.teacher(parsed))
    for half in shapes.HALVES:
        c = dataclasses.replace(
            parsed, evaluation=dataclasses.replace(parsed.evaluation, split=half)
        )
        asked = diversity.captions(c)
        print(f"{half}: {len(asked) ** 2} images in {c.evaluation.teacher_steps} steps", flush=True)
        found = diversity.of_teacher(c, datasets.Shapes(c), teacher, asked)
        entries.append({"of": diversity.described(c, asked), "numbers": found.tolist()})
    json_files.write(diversity.asset(), entries, indent=0)
    print(f"wrote {diversity.asset()}")


if __name__ == "__main__":
    main()
