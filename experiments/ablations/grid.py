"""The ablations of the SANA-Sprint paper as data: which runs, which tables they fill, what the
paper says.

A run changes the base card of a scale in a few named keys and is repeated over seeds; tables share
runs, so the baseline is made once. The direction that a table claims is read off the paper's own
numbers: of two rows, the one with the lower FID, or the higher CLIP score, is the better one.
"""

import dataclasses

KINDS = ("distil", "distil_untransferred", "gradients", "sample_trigflow", "sample_flow")


@dataclasses.dataclass(frozen=True)
class Run:
    """One configuration, run with several seeds.

    name: of its work directory. kind: one of KINDS,
      "distil"                a student from the teacher, scored in 1, 2 and 4 steps
      "distil_untransferred"  the same without Eq. 6-8: the flow network is taken for a TrigFlow one
      "gradients"             a short teacher from nothing, then sCM alone with the whole tangent
      "sample_trigflow", "sample_flow"   the guided teacher in evaluation.teacher_steps steps
    changes: {dotted key of the card: value}. size: "narrow" or "wide", one of the scale's small
    networks for "gradients"; "" for the card's own.
    """

    name: str
    kind: str
    changes: dict
    size: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    run: name of the run whose results it shows. label: its name in the table. metric: suffix of
    "score" and "frechet" ("2" is the student in two steps). fid, clip: the paper's numbers, None
    where it has none.
    """

    label: str
    run: str
    metric: str = ""
    fid: float | None = None
    clip: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table or figure.

    claims: pairs of labels that the paper compares. rule: "paper" reads the direction of each claim
    off the paper's numbers and skips a metric without numbers; "better" claims that the first row
    is better; "equal" claims no difference. metrics: columns. steps: the student's steps at which
    the table is judged, each a suffix of the metrics; empty where rows name their own.
    """

    name: str
    title: str
    note: str
    rows: tuple[Row, ...]
    claims: tuple[tuple[str, str], ...]
    rule: str = "paper"
    metrics: tuple[str, ...] = ("score", "frechet")
    steps: tuple[str, ...] = ("1", "2")


# Higher is better; everything else a table shows is better when it is lower.
HIGHER = ("score",)

_OFF = {"model.qk_norm": False, "teacher.base_qk_norm": False}
_SPARSE = {"model.time_scale": 1000.0, "teacher.base_time_scale": 1000.0}
_HEAD = {"phases.sprint.objective.logvar_gradient": "head"}
_FREE = {"phases.sprint.objective.tangent_normalize": False}

RUNS = (
    Run("base", "distil", {}),
    Run("scm", "distil", {"phases.sprint.objective.adv_weight": 0.0}),
    Run("ladd", "distil", {"phases.sprint.objective.scm_weight": 0.0}),
    Run("max_time_0", "distil", {"phases.sprint.objective.max_time": 0.0}),
    Run("max_time_70", "distil", {"phases.sprint.objective.max_time": 0.7}),
    Run("lambda_1", "distil", {"phases.sprint.objective.adv_weight": 1.0}),
    Run("lambda_05", "distil", {"phases.sprint.objective.adv_weight": 0.5}),
    Run("lambda_01", "distil", {"phases.sprint.objective.adv_weight": 0.1}),
    Run("no_embed", "distil", {"model.guidance_embed": False}),
    *(Run(f"norms_{size}", "gradients", {}, size) for size in ("narrow", "wide")),
    *(Run(f"no_qk_norm_{size}", "gradients", _OFF, size) for size in ("narrow", "wide")),
    *(Run(f"time_1000_{size}", "gradients", _SPARSE, size) for size in ("narrow", "wide")),
    Run("no_transfer", "distil_untransferred", {}),
    Run("teacher", "sample_trigflow", {}),
    Run(
        "p_mean_0",
        "distil",
        {"phases.sprint.objective.p_mean": 0.0, "phases.sprint.objective.p_std": 1.6},
    ),
    Run(
        "p_mean_low",
        "distil",
        {"phases.sprint.objective.p_mean": -0.8, "phases.sprint.objective.p_std": 1.6},
    ),
    Run(
        "p_mean_high",
        "distil",
        {"phases.sprint.objective.p_mean": 0.4, "phases.sprint.objective.p_std": 1.6},
    ),
    Run("disc_high", "distil", {"phases.sprint.objective.disc_mean": 0.6}),
    Run("disc_wide", "distil", {"phases.sprint.objective.disc_std": 2.0}),
    Run("flow_50", "sample_flow", {"evaluation.teacher_steps": 50}),
    Run("trigflow_50", "sample_trigflow", {"evaluation.teacher_steps": 50}),
    # Of the follow-ups alone.
    Run(
        "scm_warm",
        "distil",
        {"phases.sprint.objective.adv_weight": 0.0, "phases.sprint.objective.tangent_warmup": 80},
    ),
    Run(
        "scm_long",
        "distil",
        {"phases.sprint.objective.adv_weight": 0.0, "phases.sprint.steps": 640},
    ),
    Run(
        "ladd_long",
        "distil",
        {"phases.sprint.objective.scm_weight": 0.0, "phases.sprint.steps": 640},
    ),
    Run("scm_head", "distil", _HEAD | {"phases.sprint.objective.adv_weight": 0.0}),
    Run("both_head", "distil", _HEAD),
    Run(
        "scm_long_head",
        "distil",
        _HEAD | {"phases.sprint.objective.adv_weight": 0.0, "phases.sprint.steps": 640},
    ),
    Run("norms_late", "gradients", {"phases.teacher.steps": 900}, "wide"),
    Run("no_qk_norm_late", "gradients", _OFF | {"phases.teacher.steps": 900}, "wide"),
    *(
        Run(f"{name}_free_{size}", "gradients", changes | _FREE, size)
        for size in ("narrow", "wide")
        for name, changes in (("norms", {}), ("no_qk_norm", _OFF), ("time_1000", _SPARSE))
    ),
)


def _figure3(suffix, how, about):
    """Return Figures 3a and 3b, of the runs whose names end in a suffix before their size."""
    return tuple(
        Table(
            f"figure3{part}{suffix}",
            f"Figure 3{part}: {what}{how}",
            about,
            (
                Row("with, narrow", f"norms{suffix}_narrow"),
                Row("without, narrow", f"{run}{suffix}_narrow"),
                Row("with, wide", f"norms{suffix}_wide"),
                Row("without, wide", f"{run}{suffix}_wide"),
            ),
            (("with, narrow", "without, narrow"), ("with, wide", "without, wide")),
            rule="better",
            metrics=("grad_norm", "tangent_norm"),
            steps=(),
        )
        for part, what, run in (
            ("a", "QK-norm", "no_qk_norm"),
            ("b", "dense times (1) against 1000", "time_1000"),
        )
    )


TABLES = (
    Table(
        "table3",
        "Table 3: sCM and LADD",
        "Which of the two losses trains the student.",
        (
            Row("sCM", "scm", fid=8.93, clip=27.51),
            Row("LADD", "ladd", fid=12.20, clip=27.00),
            Row("sCM + LADD", "base", fid=8.11, clip=28.02),
        ),
        (("sCM + LADD", "sCM"), ("sCM + LADD", "LADD"), ("sCM", "LADD")),
    ),
    Table(
        "table6",
        "Table 6: max-time weighting",
        "Probability p that the adversarial branch starts from pure noise.",
        (
            Row("0 %", "max_time_0", fid=9.44, clip=27.65),
            Row("50 %", "base", fid=8.32, clip=27.94),
            Row("70 %", "max_time_70", fid=8.11, clip=28.02),
        ),
        (("50 %", "0 %"), ("70 %", "0 %"), ("70 %", "50 %")),
    ),
    Table(
        "table5",
        "Table 5: weight of the adversarial loss",
        "sCM : LADD. 1 : 5 is the toy default and has no row in the paper.",
        (
            Row("1 : 0.1", "lambda_01", fid=8.90, clip=27.76),
            Row("1 : 0.5", "lambda_05", fid=8.43, clip=27.85),
            Row("1 : 1", "lambda_1", fid=8.81, clip=27.93),
            Row("1 : 5", "base"),
        ),
        (("1 : 0.5", "1 : 0.1"), ("1 : 0.5", "1 : 1"), ("1 : 1", "1 : 0.1")),
    ),
    Table(
        "table4",
        "Table 4: embedded guidance scale",
        "Without the embedding the student learns the unguided teacher, as in the published code; "
        "the paper's text keeps guidance in its teacher.",
        (
            Row("without", "no_embed", fid=9.23, clip=27.15),
            Row("with", "base", fid=8.72, clip=28.09),
        ),
        (("with", "without"),),
    ),
    *_figure3(
        "",
        "",
        "Short teachers from nothing, then sCM alone with the whole tangent (r = 1). Geometric "
        "mean over its updates of the gradient's norm before clipping, and of the tangent's norm "
        "before it is normalized.",
    ),
    Table(
        "figure3d",
        "Figure 3d: schedule transfer",
        "Without it the flow network is distilled as if it were a TrigFlow one. The paper shows "
        "images: training diverges.",
        (Row("with", "base"), Row("without", "no_transfer")),
        (("with", "without"),),
        rule="better",
    ),
    Table(
        "figure5",
        "Figure 5: steps of the student",
        "The paper's numbers are those of its 0.6B model in Table 2 and of SANA 0.6B in 20 steps.",
        (
            Row("1 step", "base", "1", 7.04, 28.04),
            Row("2 steps", "base", "2", 6.54, 28.40),
            Row("4 steps", "base", "4", 6.48, 28.45),
            Row("teacher, 20 steps", "teacher", "", 5.81, 28.36),
        ),
        (("2 steps", "1 step"), ("4 steps", "2 steps"), ("teacher, 20 steps", "1 step")),
        steps=(),
    ),
    Table(
        "samplers",
        "Appendix: times of the generator",
        "(P_mean, P_std). The paper finds (0.0, 1.6) best among its means at 1.6, from sCM alone. "
        "Here both losses train.",
        (
            Row("(-0.8, 1.6)", "p_mean_low"),
            Row("(0.0, 1.6)", "p_mean_0"),
            Row("(0.4, 1.6)", "p_mean_high"),
            Row("(-0.4, 1.4), toy default", "base"),
        ),
        (("(0.0, 1.6)", "(-0.8, 1.6)"), ("(0.0, 1.6)", "(0.4, 1.6)")),
        rule="better",
    ),
    Table(
        "disc_samplers",
        "Appendix: times of the discriminator",
        "(mean, standard deviation) of the renoising; the paper gives FID alone.",
        (
            Row("(-0.6, 1.0)", "base", fid=9.48),
            Row("(-0.6, 2.0)", "disc_wide", fid=10.36),
            Row("(0.6, 1.0)", "disc_high", fid=12.85),
        ),
        (
            ("(-0.6, 1.0)", "(-0.6, 2.0)"),
            ("(-0.6, 1.0)", "(0.6, 1.0)"),
            ("(-0.6, 2.0)", "(0.6, 1.0)"),
        ),
    ),
    Table(
        "table1",
        "Table 1: flow and TrigFlow sampling of the teacher",
        "50 steps with guidance; the same noise for both within a seed.",
        (
            Row("flow Euler", "flow_50", fid=5.81, clip=28.810),
            Row("TrigFlow", "trigflow_50", fid=5.73, clip=28.806),
        ),
        (("flow Euler", "TrigFlow"),),
        rule="equal",
        steps=(),
    ),
)

# Questions that follow where scale `tiny` disagrees with the paper.
FOLLOW_UPS = (
    Table(
        "table3_head",
        "Table 3: does the log-variance's gradient spoil sCM?",
        "network: the gradient of the adaptive weight's log-variance trains its head and, through "
        "it, the time embedding that modulates all blocks, as published. head: it trains the head "
        "alone, as the toy default does. Long: 640 updates.",
        (
            Row("sCM, network", "scm"),
            Row("sCM, head", "scm_head"),
            Row("LADD", "ladd"),
            Row("sCM + LADD, network", "base"),
            Row("sCM + LADD, head", "both_head"),
            Row("sCM, long, network", "scm_long"),
            Row("sCM, long, head", "scm_long_head"),
            Row("LADD, long", "ladd_long"),
        ),
        (
            ("sCM, head", "sCM, network"),
            ("sCM + LADD, head", "sCM + LADD, network"),
            ("sCM, long, head", "sCM, long, network"),
            ("sCM, head", "LADD"),
            ("sCM + LADD, head", "LADD"),
            ("sCM + LADD, head", "sCM, head"),
            ("sCM, long, head", "LADD, long"),
        ),
        rule="better",
    ),
    Table(
        "table3_late",
        "Table 3: is sCM behind LADD for its warm-up, or for the short training?",
        "H = 300 is the baseline of 320 updates, so the whole tangent is reached only at the end. "
        "Long: 640 updates.",
        (
            Row("sCM", "scm"),
            Row("sCM, H = 80", "scm_warm"),
            Row("LADD", "ladd"),
            Row("sCM, long", "scm_long"),
            Row("LADD, long", "ladd_long"),
        ),
        (("sCM, H = 80", "sCM"), ("sCM, H = 80", "LADD"), ("sCM, long", "LADD, long")),
        rule="better",
    ),
    Table(
        "figure3a_late",
        "Figure 3a: do norms grow without QK-norm once the teacher has trained for longer?",
        "The wide network of Figure 3a after 300 updates of its teacher, and late: after 900.",
        (
            Row("with", "norms_wide"),
            Row("without", "no_qk_norm_wide"),
            Row("with, late", "norms_late"),
            Row("without, late", "no_qk_norm_late"),
        ),
        (("with", "without"), ("with, late", "without, late")),
        rule="better",
        metrics=("grad_norm", "tangent_norm"),
        steps=(),
    ),
    *_figure3(
        "_free",
        ", where the tangent is not normalized",
        "As in the paper's suite, but the tangent enters the loss as it is. Paper and published "
        "code divide it by its norm, which hides its length from the gradient.",
    ),
    Table(
        "disc_std",
        "Appendix: the spread of the discriminator's times",
        "(mean, standard deviation) of the renoising; the paper gives FID alone. The runs are "
        "those of the paper's suite, seed by seed, so this table adds to that one only with a "
        "larger --seeds.",
        (Row("(-0.6, 1.0)", "base", fid=9.48), Row("(-0.6, 2.0)", "disc_wide", fid=10.36)),
        (("(-0.6, 1.0)", "(-0.6, 2.0)"),),
    ),
)


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tables that one command makes. name: value of --suite, and the report's default name."""

    name: str
    title: str
    tables: tuple[Table, ...]


PAPER = Suite("paper", "The paper's ablations", TABLES)
SUITES = (
    PAPER,
    Suite("followups", "Follow-ups: where the ablations disagree with the paper", FOLLOW_UPS),
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the runs are.

    preset: of configs/sprint.py. base: changes of every run. gradients: further changes for runs of
    that kind. sizes: their networks. minutes: expected time of the paper's suite with three seeds.
    """

    name: str
    preset: str
    base: dict
    gradients: dict
    sizes: dict
    minutes: str


_SHORT = {
    "phases.sprint.objective.adv_weight": 0.0,
    "phases.sprint.objective.tangent_warmup": 1,
    "teacher.pretrained": "",
    "run.max_rejected": 1_000_000,
}

TINY = Scale(
    "tiny",
    "sprint",
    # From logvar_gradient on as the suite was run; the preset has had others since.
    {
        "phases.sprint.steps": 320,
        "phases.sprint.batch": 16,
        "run.checkpoint_every": 80,
        "run.keep": 1,
        "run.max_rejected": 1_000_000,
        "phases.sprint.objective.logvar_gradient": "network",
        "phases.sprint.objective.logvar_start": 0.0,
        "phases.sprint.objective.max_time": 0.5,
        "phases.sprint.objective.head_blocks": (1, 3, 5),
    },
    _SHORT
    | {
        "phases.teacher.steps": 300,
        "phases.teacher.batch": 32,
        "phases.teacher.optimizers.network.warmup": 30,
        "phases.sprint.steps": 40,
        "phases.sprint.batch": 16,
        "run.log_every": 2,
        "run.checkpoint_every": 150,
        "model.unroll": 1,
    },
    {
        "narrow": {
            "model.width": 64,
            "model.depth": 4,
            "model.heads": 2,
            "model.cross_heads": 2,
            "phases.sprint.objective.head_blocks": (1, 3),
        },
        "wide": {
            "model.width": 128,
            "model.depth": 4,
            "model.heads": 4,
            "model.cross_heads": 4,
            "phases.sprint.objective.head_blocks": (1, 3),
        },
    },
    "about 90 on one CPU core",
)

SMALL = Scale(
    "small",
    "emoji",
    {
        "model.width": 384,
        "model.depth": 12,
        "model.heads": 12,
        "model.cross_heads": 6,
        "model.unroll": 1,
        "model.dtype": "bfloat16",
        "phases.teacher.steps": 6000,
        "phases.teacher.batch": 128,
        "phases.sprint.steps": 1600,
        "phases.sprint.batch": 64,
        "phases.sprint.objective.head_blocks": (2, 5, 8, 11),
        "evaluation.prompts": 192,
        "evaluation.batch": 96,
        "evaluation.reference": 256,
        "data.workers": 4,
        "run.checkpoint_every": 400,
        "run.keep": 1,
        "run.max_rejected": 1_000_000,
    },
    _SHORT | {"phases.teacher.steps": 800, "phases.sprint.steps": 80, "run.log_every": 2},
    {"narrow": {"model.width": 192, "model.heads": 6}, "wide": {}},
    "not yet run; by arithmetic about 60 on one GPU: 10 for the teacher, once, and 10 for "
    "--only=table3",
)

SCALES = (TINY, SMALL)


def run(name: str) -> Run:
    return next(r for r in RUNS if r.name == name)


def runs_of(tables) -> list[Run]:
    """Return the runs that some tables need, each once, in the order of the tables."""
    names = dict.fromkeys(row.run for t in tables for row in t.rows)
    return [run(name) for name in names]


def changes(scale: Scale, r: Run) -> dict:
    """Return all that a run changes in the card of its scale, {dotted key: value}.

    Later changes replace earlier ones.
    """
    gradients = scale.gradients | scale.sizes[r.size] if r.kind == "gradients" else {}
    return scale.base | gradients | r.changes
