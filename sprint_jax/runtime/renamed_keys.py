"""Config keys of older versions, and what they are called now."""

# Keys of version 0.1 and where they are now; the longest prefix counts.
RENAMED = {
    "teacher.steps": "phases.teacher.steps",
    "teacher.batch": "phases.teacher.batch",
    "teacher.accumulate": "phases.teacher.accumulate",
    "teacher.ema": "phases.teacher.ema",
    "teacher.optimizer": "phases.teacher.optimizers.network",
    "teacher.caption_dropout": "phases.teacher.objective.caption_dropout",
    "teacher.border_start": "phases.teacher.objective.border_start",
    "teacher.time_mean": "phases.teacher.objective.time_mean",
    "teacher.time_std": "phases.teacher.objective.time_std",
    "teacher.time_shift": "phases.teacher.objective.time_shift",
    "teacher.finetune_steps": "phases.finetune.steps",
    "teacher.finetune_lr": "phases.finetune.optimizers.network.lr",
    "run.strip_every": "run.preview_every",
    "control.steps": "phases.control.steps",
    "control.batch": "phases.control.batch",
    "control.optimizer": "phases.control.optimizers.network",
    "control.dropout": "phases.sprint.objective.control_dropout",
    "sprint": "phases.sprint.objective",
    "sprint.steps": "phases.sprint.steps",
    "sprint.batch": "phases.sprint.batch",
    "sprint.accumulate": "phases.sprint.accumulate",
    "sprint.ema": "phases.sprint.ema",
    "sprint.optimizer": "phases.sprint.optimizers.student",
    "sprint.head_optimizer": "phases.sprint.optimizers.heads",
}


def renamed(key: str) -> str | None:
    """Return today's name of a dotted key of version 0.1, None for any other key.

    Neither has "config." in front.
    """
    words = key.split(".")
    for length in range(len(words), 0, -1):
        old = ".".join(words[:length])
        if old in RENAMED:
            return ".".join([RENAMED[old], *words[length:]])
    return None
