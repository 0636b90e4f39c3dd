"""Measure a model, or images in a folder, by the field's metrics.

    shapes       our checker of the embedded captions, GenEval's counterpart without a detector
    fid          --weights=pt_inception-2015-12-05-6726825d.pth (or .safetensors)
                 --reference=FILE.npz or FOLDER
    clip         --weights=FOLDER of openai/clip-vit-large-patch14
    geneval      --prompts=evaluation_metadata.jsonl, then --detections=FILE.jsonl
    dpg          --prompts=dpg_bench.csv, then --answers=FILE.jsonl
    imagereward  --hook=module:function

Generates the images (existing files are kept: run the command again to resume), scores them, and
writes OUT/report-SUITE.json and .md. --folder=DIR scores the images of a folder instead.
--shard=i/n generates every n-th image, for n of these commands; then the command without it
scores.
"""

import pathlib

from sprint_jax.evaluation.options import Options
from sprint_jax.runtime import cli, compile_cache
from sprint_jax.storage import settings


def run(options: Options) -> pathlib.Path | None:
    """Evaluate, and return the report's path; None if nothing is scored. Raises UserError."""
    cli.check_output_file("save_reference", options.save_reference)
    if options.save_weights:
        cli.require("weights", options.weights, "give the .pth file that --save_weights is made of")
        cli.check_output_file("save_weights", options.save_weights)
        from sprint_jax.evaluation import extractors

        extractors.save_inception(
            options.weights or "", options.save_weights, unpublished=options.unpublished_weights
        )
        print(f"the weights are in {options.save_weights}: give it as --weights")
        return None
    from sprint_jax.evaluation import run as evaluation

    compile_cache.start()
    part = (options.shard or "").replace("/", "of")  # shares of one folder are drawn at once
    with settings.folder_claim(options.out, "--out", part):
        return evaluation.run(options)
