"""ControlNet: identities, parity with diffusers on random weights, what its training changes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from helpers.arrays import normals, relative_error
from helpers.compiler import SAME_BITS
from helpers.configs import card
from helpers.networks import linear_dit
from sprint_jax import build, config
from sprint_jax.diffusion import samplers
from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import Controlled, ControlNet
from sprint_jax.objectives import views
from sprint_jax.objectives.conditions import conditions
from sprint_jax.sampling import generation, loading, pipeline, programs
from sprint_jax.storage import image_files, weights
from sprint_jax.toy import shapes
from sprint_jax.training import datasets, sharding, stages

TRUNK = linear_dit(
    in_channels=4,
    width=24,
    depth=4,
    heads=3,
    cross_heads=2,
    mlp_ratio=1.5,
    text_dim=10,
    guidance_embed=True,
)
NET = dataclasses.replace(TRUNK, guidance_embed=False)
MODEL = Controlled(trunk=TRUNK, control=ControlNet(net=NET, depth=2))


def randomize(params, seed=0):
    """Return the parameters with noise added to each."""
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten(
        [a + 0.1 * normals(*a.shape, seed=seed + i) for i, a in enumerate(leaves)]
    )


def arguments(batch=3):
    """Return keyword arguments of `apply` for a batch of up to three samples."""
    mask = (np.arange(5) < np.array([5, 3, 1])[:batch, None]).astype(np.float32)
    told = dict(
        text=normals(batch, 5, 10, seed=1), mask=mask, guidance=np.float32([4.5, 1.0, 2.0][:batch])
    )
    return dict(x=normals(batch, 4, 6, 4), t=np.float32([0.9, 0.5, 0.1][:batch])) | told


def apply(model, params, **kwargs):
    """Return model.apply, compiled so that equal programs give equal bits."""
    return jax.jit(lambda p, k: model.apply(p, **k), compiler_options=SAME_BITS)(params, kwargs)


def test_a_fresh_controlnet_changes_nothing():
    """With zero projections the steered transformer equals the trunk, whatever the condition."""
    trunk = randomize(TRUNK.init(jax.random.key(0)))
    params = {"trunk": trunk, "control": MODEL.control.init_from(trunk)}
    given = dict(control=normals(3, 4, 6, 4, seed=2), control_scale=np.ones(3, np.float32))
    steered = apply(MODEL, params, **arguments(), **given).velocity
    np.testing.assert_allclose(steered, apply(TRUNK, trunk, **arguments()).velocity, atol=1e-6)


def test_no_condition_and_scale_zero_give_the_trunk():
    params = randomize(MODEL.init(jax.random.key(0)))
    alone = apply(TRUNK, params["trunk"], **arguments()).velocity
    np.testing.assert_array_equal(apply(MODEL, params, **arguments()).velocity, alone)
    control = normals(3, 4, 6, 4, seed=2)
    zero = apply(
        MODEL, params, **arguments(), control=control, control_scale=np.zeros(3, np.float32)
    ).velocity
    np.testing.assert_allclose(zero, alone, atol=1e-6)
    # Each sample has a scale of its own.
    some = apply(
        MODEL, params, **arguments(), control=control, control_scale=np.float32([0, 1, 0])
    ).velocity
    listed = apply(
        MODEL,
        MODEL.unstack(params),
        **arguments(),
        control=control,
        control_scale=np.float32([0, 1, 0]),
    ).velocity
    np.testing.assert_allclose(listed, some, atol=1e-5)
    np.testing.assert_allclose(some[::2], alone[::2], atol=1e-6)
    assert np.abs(some[1] - alone[1]).max() > 1e-2


def test_residuals_are_added_after_blocks_one_and_two():
    """Block 0 is unchanged and block 1 differs by the first residual alone.

    Checked by features; a list of blocks gives the same result.
    """
    params = randomize(TRUNK.init(jax.random.key(0)))
    residuals = normals(2, 3, 4, 6, 24, seed=3)
    plain = apply_features(params, None)
    given = apply_features(params, residuals)
    np.testing.assert_array_equal(given[0], plain[0])
    np.testing.assert_allclose(given[1] - plain[1], residuals[0].reshape(3, 24, 24), atol=1e-5)
    assert np.abs(given[2] - plain[2] - residuals[1].reshape(3, 24, 24)).max() > 1e-2
    only = apply_features(params, residuals * np.float32([0, 1])[:, None, None, None, None])
    np.testing.assert_allclose(only[2] - plain[2], residuals[1].reshape(3, 24, 24), atol=1e-5)
    for ours, again in zip(given, apply_features(TRUNK.unstack(params), residuals)):
        np.testing.assert_allclose(ours, again, atol=1e-5)


def apply_features(params, residuals):
    model = lambda p, r: TRUNK.apply(p, **arguments(), features=(0, 1, 2, 3), residuals=r).features
    return jax.jit(model, compiler_options=SAME_BITS)(params, residuals)


def test_without_residuals_all_blocks_are_one_loop():
    """With two residuals there are three loops: before, during and after the blocks that
    add them.
    """
    params = TRUNK.init(jax.random.key(0))
    loops = lambda r: str(
        jax.make_jaxpr(lambda p: TRUNK.apply(p, **arguments(), residuals=r).velocity)(params)
    ).count("= scan[")
    assert loops(None) == 1
    assert loops(np.zeros((2, 3, 4, 6, 24), np.float32)) == 3


def test_too_many_residuals_and_wrong_conditions_are_refused():
    params = MODEL.init(jax.random.key(0))
    with pytest.raises(ValueError, match="4 residuals for 4 blocks"):
        TRUNK.apply(params["trunk"], **arguments(), residuals=np.zeros((4, 3, 4, 6, 24)))
    with pytest.raises(ValueError, match="control has shape"):
        MODEL.apply(params, **arguments(), control=np.zeros((3, 2, 2, 4)), control_scale=np.ones(3))
    with pytest.raises(ValueError, match="depth 4"):
        ControlNet(net=NET, depth=4)


def test_parity_with_diffusers(tmp_path):
    """Residuals and the steered transformer agree on random weights, and exported tensors are
    bit-equal.
    """
    torch = pytest.importorskip("torch")
    from helpers import fabricate
    from helpers.torch_models import converted, from_torch, to_torch
    from sprint_jax.conversion import configs, folder, rules, tables
    from sprint_jax.storage import safetensors_files

    theirs = fabricate.controlnet().eval()
    model, params = converted(
        theirs, "controlnet", lambda c: configs.controlnet(c, "float32"), tmp_path / "controlnet"
    )
    assert model.net.time_scale == 1000.0
    assert not model.net.qk_norm
    assert model.depth == 2
    x, control, text = normals(3, 4, 6, 8), normals(3, 4, 6, 8, seed=5), normals(3, 9, 48, seed=1)
    mask = (np.arange(9) < np.array([9, 4, 1])[:, None]).astype(np.float32)
    t = np.float32([0.9, 0.4, 0.03])
    scale = np.full(3, 0.7, np.float32)
    ours = jax.jit(model.apply, compiler_options=SAME_BITS)(
        params, x, t, text, mask, control=control, scale=scale
    )
    with torch.no_grad():
        expected = theirs(
            to_torch(x),
            torch.tensor(text),
            torch.tensor(1000 * t),
            to_torch(control),
            0.7,
            encoder_attention_mask=torch.tensor(mask),
        ).controlnet_block_samples
    for residual, other in zip(ours, expected, strict=True):
        assert relative_error(residual.reshape(3, 24, 32), other.numpy()) < 1e-5

    trunk = fabricate.transformer(guidance_embeds=False).eval()
    description, trunk_params = converted(
        trunk, "transformer", lambda c: configs.transformer(c, "float32"), tmp_path / "transformer"
    )
    description = dataclasses.replace(description, time_scale=1000.0)
    both = Controlled(trunk=description, control=model)
    made = apply(
        both,
        {"trunk": trunk_params, "control": params},
        x=x,
        t=t,
        text=text,
        mask=mask,
        control=control,
        control_scale=scale,
    ).velocity
    with torch.no_grad():
        reference = trunk(
            to_torch(x),
            torch.tensor(text),
            torch.tensor(1000 * t),
            encoder_attention_mask=torch.tensor(mask),
            controlnet_block_samples=tuple(expected),
        ).sample
    assert relative_error(made, from_torch(reference)) < 1e-5

    # The export restores the tensors.
    back = rules.export(tables.controlnet(model), params)
    found = safetensors_files.find(tmp_path / "controlnet", "diffusion_pytorch_model")
    assert back.keys() == found.keys()
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor.numpy())
    assert configs.controlnet(configs.controlnet_json(model), "float32") == model
    dense = dataclasses.replace(
        model, net=dataclasses.replace(model.net, qk_norm=True, time_scale=1.0)
    )
    assert configs.controlnet_json(dense)["_class_name"] == "SprintControlNetModel"
    assert configs.controlnet(configs.controlnet_json(dense), "float32") == dense
    assert folder.read_controlnet(tmp_path)[0] == model  # the folder of a whole pipeline


def test_multi_step_pipeline_agrees_with_diffusers(tmp_path):
    """Compare latents of our guided flow sampler with a ControlNet to SanaControlNetPipeline.

    Both make four steps from the same noise.
    """
    torch = pytest.importorskip("torch")
    import diffusers

    from helpers import fabricate
    from helpers.torch_models import converted, from_torch, to_torch
    from sprint_jax.conversion import configs

    tok = fabricate.tokenizer()
    control, trunk = (
        fabricate.controlnet().eval(),
        fabricate.transformer(guidance_embeds=False).eval(),
    )
    theirs = diffusers.SanaControlNetPipeline(
        tokenizer=tok,
        text_encoder=fabricate.text_encoder(len(tok)),
        vae=fabricate.autoencoder(),
        transformer=trunk,
        controlnet=control,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    theirs.set_progress_bar_config(disable=True)
    text, null = normals(2, 9, 48, seed=1), normals(2, 9, 48, seed=2)
    mask = (np.arange(9) < np.array([9, 4])[:, None]).astype(np.int64)
    noise, hint = normals(2, 3, 5, 8, seed=3), normals(2, 3, 5, 8, seed=4)
    theirs.prepare_image = lambda **kwargs: to_torch(
        np.concatenate([hint, hint])
    )  # latents, without the autoencoder
    theirs.vae.encode = lambda image: type(
        "Encoded", (), {"latent": image / theirs.vae.config.scaling_factor}
    )()
    expected = theirs(
        negative_prompt=None,
        prompt_embeds=torch.tensor(text),
        prompt_attention_mask=torch.tensor(mask),
        negative_prompt_embeds=torch.tensor(null),
        negative_prompt_attention_mask=torch.tensor(mask),
        control_image=torch.zeros(2, 3, 96, 160),
        height=96,
        width=160,
        num_inference_steps=4,
        guidance_scale=4.5,
        controlnet_conditioning_scale=0.8,
        latents=to_torch(noise),
        use_resolution_binning=False,
        output_type="latent",
    ).images

    net, control_params = converted(
        control, "controlnet", lambda c: configs.controlnet(c, "float32"), tmp_path / "controlnet"
    )
    description, trunk_params = converted(
        trunk, "transformer", lambda c: configs.transformer(c, "float32"), tmp_path / "transformer"
    )
    model = Controlled(trunk=dataclasses.replace(description, time_scale=1000.0), control=net)
    sigmas = theirs.scheduler.sigmas.numpy()
    cond = {
        "text": text,
        "mask": mask.astype(np.float32),
        "control": hint,
        "control_scale": np.full(2, 0.8, np.float32),
    }
    params = {"transformer": {"trunk": trunk_params, "control": control_params}, "pixels": {}}
    fixed = programs.noises
    try:
        programs.noises = lambda *args: noise[None]
        sampler = programs.teacher_sampler(model, _Latents(), (3, 5, 8), sigmas, sampler="flow")
        made, _ = sampler(params, {"text": null, "mask": mask}, cond, 4.5, 0, np.arange(2))
    finally:
        programs.noises = fixed
    assert relative_error(made, from_torch(expected)) < 1e-5


class _Latents:
    """A codec whose pixels are latents."""

    def checked(self, params, latents):
        return latents, np.ones(len(latents), bool)


@pytest.fixture(scope="module")
def small():
    """Return the config of a shallow model with a ControlNet."""
    tree = card("controlnet")
    tree.control.depth, tree.model.depth = 1, 2
    return config.parse(tree)


@pytest.fixture(scope="module")
def batch(small):
    """Return (data set, batch of 8)."""
    data = datasets.Shapes(small)
    with data.batches(8, 0, 1, 0, 1) as batches:
        return data, next(batches)


def test_batches_hold_the_edges_of_their_images(small, batch):
    """The condition is the encoded edge map of the same image, in training and in the
    held-out set.
    """
    from sprint_jax.conditioning import sketches
    from sprint_jax.toy import freehand

    data, rows = batch
    codec = build.codec(small)
    usual = [
        i for i in range(8) if not freehand.is_rough(small.data.seed, i, small.control.freehand)
    ]
    drawn = np.stack(
        [shapes.example(small.data.seed, i, size=small.data.size).image for i in usual]
    )
    edges = sketches.to_rgb(sketches.gradient_edges(drawn))
    np.testing.assert_allclose(rows["control"][usual], codec.encode(edges), atol=1e-6)
    heldout = data.heldout(4, 2)
    np.testing.assert_array_equal(heldout.edges, sketches.gradient_edges(heldout.images))
    np.testing.assert_array_equal(heldout.cond["control_scale"], np.ones(4))


def test_control_stage_trains_the_controlnet_alone(small, batch):
    """The trunk is an argument and not part of the state."""
    data, rows = batch
    teacher = randomize(build.teacher(small).init(jax.random.key(0)))
    stage = stages.make(small, "control", data, teacher=teacher)
    assert jax.tree.structure(stage.frozen.teacher) == jax.tree.structure(teacher)
    state = stage.start(stage.frozen, stage.init_arrays)
    np.testing.assert_array_equal(
        state.roles["network"].params["blocks"]["ff"]["conv_point"]["kernel"],
        teacher["blocks"]["ff"]["conv_point"]["kernel"][:1],
    )
    new, report = jax.jit(stage.functions[0], compiler_options=SAME_BITS)(state, stage.frozen, rows)
    # At first only the outer zero projection has a gradient. The inner parts follow once it
    # changed.
    assert report.norms["grad_norm/zero_out/kernel"] > 0
    assert report.norms["grad_norm/zero_in/kernel"] == 0
    assert np.abs(stage.result(new)["zero_out"]["kernel"]).max() > 0


def test_a_dropped_condition_is_no_condition(small, batch):
    """The sprint drops the sketch of its share of samples; other draws of a step do not depend on
    it.
    """
    _, rows = batch
    many = {name: np.repeat(rows[name], 100, 0) for name in ("text", "mask", "control")}
    key = jax.random.key(5)
    scale = np.asarray(conditions(many, key, 0.25)["control_scale"])
    assert set(scale) == {0.0, 1.0} and 0.7 < scale.mean() < 0.8
    assert conditions(many, key, 0.0)["control_scale"].min() == 1.0
    without = {k: rows[k] for k in ("text", "mask")}
    assert conditions(without, key, 0.25).keys() == {"text", "mask"}


def test_student_and_teacher_both_receive_the_condition(small, batch):
    """The velocity of sCM and the student's prediction depend on the condition.

    The student starts as the teacher. Without dropout all samples have the condition.
    """
    data, rows = batch
    networks = stages.networks(small, small.phases["sprint"])
    student = networks.trained
    teacher = randomize(networks.teacher.init(jax.random.key(0)))
    params = views.student_params(teacher, student, jax.random.key(1), logvar_start=0.0)
    assert isinstance(networks.teacher, Controlled) and isinstance(student, Controlled)
    cond = {
        "text": rows["text"],
        "mask": rows["mask"],
        "control": rows["control"],
        "control_scale": np.ones(8, np.float32),
    }
    w, t = jnp.full(8, 1.5), jnp.linspace(0.2, 1.4, 8)
    x = normals(*rows["latent"].shape, seed=4)
    frozen = data.frozen.replace(teacher=teacher)

    @jax.jit
    def both(cond):
        F, _ = views.student_F(student, params, cond, w)(x, t)
        unguided = views.teacher_velocity(networks, frozen, cond, jnp.ones(8), "cond")
        return F, unguided(0.5 * x, t) / 0.5

    F, velocity = both(cond)
    np.testing.assert_allclose(F, velocity, atol=1e-4)
    other = both(cond | {"control": np.roll(rows["control"], 1, 0)})
    assert np.abs(other[0] - F).max() > 1e-2
    assert np.abs(other[1] - velocity).max() > 1e-2


def test_dropping_every_condition_gives_the_controlnet_no_gradient(small, batch):
    """The gradient is zero at a share of 1 and not at 0.

    Fails when the steps of the stage ignore the config's share.
    """
    data, rows = batch
    adversarial = dataclasses.replace(small.phases["sprint"].objective, scm_weight=0.0)
    teacher = randomize(jax.jit(build.distilled_teacher(small).init)(jax.random.key(0)))

    def stage_of(share):
        objective = dataclasses.replace(adversarial, control_dropout=share)
        c = stages.with_phase(small, "sprint", objective=objective)
        return stages.make(c, "sprint", data, teacher=teacher)

    stage = stage_of(0.0)
    start = jax.jit(stage.start)(stage.frozen, stage.init_arrays)
    # One program for all shares.
    norms_of = jax.jit(lambda share, *args: stage_of(share).functions[0](*args)[1].norms)
    for share, taught in ((0.0, True), (1.0, False)):
        found = norms_of(share, start, stage.frozen, rows)
        norms = [float(v) for name, v in found.items() if name.startswith("grad_norm/control")]
        assert norms and all((norm > 0) == taught for norm in norms)
        assert found["grad_norm/trunk/blocks"] > 0


def test_every_new_parameter_has_a_sharding_rule(small):
    """All are sharded over fsdp in the state of both phases, with CAME's factored moments; none
    takes the default.
    """
    came = dataclasses.replace(
        small.phases["control"].optimizers["network"], kind="came", b3=0.9999
    )
    heads = small.phases["sprint"].optimizers["heads"]
    c = stages.with_phase(small, "control", optimizers={"network": came})
    c = stages.with_phase(c, "sprint", optimizers={"student": came, "heads": heads})
    mesh = jax.sharding.AbstractMesh((1, 2), ("data", "fsdp"))
    teacher = jax.eval_shape(build.teacher(c).init, jax.random.key(0))
    control = jax.eval_shape(build.distilled_teacher(c).init, jax.random.key(0))
    data, checked = datasets.Abstract(c), set()
    for stage in (
        stages.make(c, "control", data, teacher=teacher),
        stages.make(c, "sprint", data, teacher=control),
    ):
        frozen = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), stage.frozen)
        state = jax.eval_shape(stage.start, frozen, stage.init_arrays)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if (
                leaf.ndim >= 2
                and leaf.size > 1
                and "zero_" in name
                and "/row/" not in name
                and "res_row" not in name
            ):
                assert sharding._spec(name, leaf, mesh) != jax.sharding.PartitionSpec(), name
                checked.add(stage.name)
    assert checked == {"control", "sprint"}


def test_generate_follows_a_sketch_or_refuses_it(small):
    """A model without a ControlNet refuses a sketch by name.

    With one, the sketch changes the image and scale 0 does not.
    """
    from sprint_jax.encoders import pixels as pixel_codecs
    from sprint_jax.encoders import text as text_encoders

    params = randomize(build.student(small).init(jax.random.key(0)))
    pipe = pipeline.Pipeline(
        model=build.student(small),
        text=text_encoders.EmbeddedText(build.text_encoder(small)),
        pixels=pixel_codecs.EmbeddedPixels(build.codec(small)),
        params={"transformer": params, "text": {}, "pixels": {}},
        height=32,
        width=32,
        guidance_scale=1.5,
        schedule="code",
        batch_size=1,
        dtype="float32",
    )
    assert pipe.control
    sketch = np.zeros((32, 32, 3), np.uint8)
    sketch[8:24, 10] = 255
    make = lambda **kwargs: generation.generate(pipe, ["a red circle"], steps=1, seed=3, **kwargs)
    free = make()
    np.testing.assert_array_equal(make(control=sketch, control_scale=0.0), free)
    assert (make(control=sketch) != free).any()
    with pytest.raises(UserError, match="control_scale nan"):
        make(control=sketch, control_scale=float("nan"))
    with pytest.raises(UserError, match="control has shape"):
        make(control=sketch[:16])
    plain = dataclasses.replace(
        pipe,
        model=pipe.model.trunk,
        params=pipe.params | {"transformer": params["trunk"]},
    )
    with pytest.raises(UserError, match="has no ControlNet"):
        generation.generate(plain, ["a red circle"], control=sketch)
    times = samplers.scm_times(1, "code")
    sampler = programs.student_sampler(
        build.student(small), pipe.pixels, build.latent_shape(small), times
    )
    text, mask = build.text_encoder(small).encode(["a red circle"])
    cond = {
        "text": text,
        "mask": mask,
        "control": np.asarray(pipe.encode(sketch[None])),
        "control_scale": np.ones(1, np.float32),
    }
    again, _ = sampler(
        {"transformer": params, "pixels": {}}, {}, cond, np.float32(1.5), np.int32(3), np.arange(1)
    )
    assert np.abs(np.asarray(again, int) - make(control=sketch)).max() <= 1


# --- commands ---


@pytest.mark.slow
def test_the_main_job_trains_distils_and_scores(finished_controlnet):
    """Every stage is present.

    Real images agree completely with their own sketches and not with those of other prompts.
    """
    rows = [
        json.loads(line)
        for line in (finished_controlnet / "metrics.jsonl").read_text().splitlines()
    ]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == [
        "teacher",
        "finetune",
        "control",
        "sprint",
    ]
    summary = json.loads((finished_controlnet / "summary.json").read_text())
    names = {
        "real",
        "mismatched",
        "teacher_20",
        "teacher_1",
        "student_1",
        "student_1_free",
        "student_2",
        "student_4",
    }
    names |= {"teacher_freehand", "student_1_freehand"}
    assert summary["agreement"].keys() == names == summary["scores"].keys()
    assert summary["agreement"]["real"] == 1.0
    assert summary["agreement"]["mismatched"] < 0.5
    with (
        Image.open(finished_controlnet / "samples_control.png") as sheet,
        Image.open(finished_controlnet / "samples_real.png") as real,
    ):
        assert sheet.size == real.size
        assert set(np.unique(np.asarray(sheet))) <= {
            0,
            255,
            96,
        }  # lines, background, and the grid's gray
    with (
        Image.open(finished_controlnet / "samples_freehand_sketches.png") as sheet,
        Image.open(finished_controlnet / "samples_freehand.png") as made,
    ):
        assert sheet.size == made.size
        assert len(np.unique(np.asarray(sheet))) > 3  # strokes are gray at their borders
    report = (finished_controlnet / "report.html").read_text()
    assert "edges as asked" in report
    assert "by the rough sketches" in report
    assert "<td>student_1_freehand</td>" in report


@pytest.mark.slow
def test_sample_takes_a_sketch(finished_controlnet, command, tmp_path):
    """The sketch may be absent. A sketch of another size is fitted like an initial image."""
    sketch = np.zeros((64, 64, 3), np.uint8)
    sketch[20:44, 20] = sketch[20:44, 44] = 255
    Image.fromarray(sketch).save(tmp_path / "sketch.png")
    made = []
    for name, flags in (("free", []), ("held", [f"--control={tmp_path / 'sketch.png'}"])):
        flags += [
            f"--model={finished_controlnet}",
            "--prompt=a red square",
            "--steps=1",
            f"--out={tmp_path / name}",
        ]
        result = command("sprint_jax", "sample", *flags)
        assert result.returncode == 0, result.stderr
        made.append(np.asarray(Image.open(tmp_path / name / "00000.png"), int))
    pipe = loading.load(finished_controlnet, dtype="float32")
    again = generation.generate(
        pipe, ["a red square"], steps=1, control=image_files.load(tmp_path / "sketch.png", 32, 32)
    )[0]
    assert np.abs(made[1] - again).max() <= 1
    np.testing.assert_array_equal(made[0], generation.generate(pipe, ["a red square"], steps=1)[0])


@pytest.mark.slow
def test_runs_are_converted_and_their_stages_extracted(finished_controlnet, command, tmp_path):
    from sprint_jax.conversion import folder

    result = command(
        "sprint_jax", "convert", f"--from={finished_controlnet}", f"--to={tmp_path / 'out'}"
    )
    assert result.returncode == 0, result.stderr
    model, params = folder.read_controlnet(tmp_path / "out")
    found, whole, _ = loading.read_student(finished_controlnet)
    assert dataclasses.replace(model.net, depth=2, remat="none", unroll=1) == dataclasses.replace(
        found.control.net, remat="none", unroll=1
    )
    jax.tree.map(np.testing.assert_array_equal, params, whole["control"])
    result = command(
        "sprint_jax",
        "extract",
        f"--run_dir={finished_controlnet}",
        "--stage=control",
        f"--to_file={tmp_path / 'c.safetensors'}",
    )
    assert result.returncode == 0, result.stderr
    abstract = jax.eval_shape(found.control.init, jax.random.key(0))
    kept = weights.load(finished_controlnet / "controlnet.safetensors", abstract)
    jax.tree.map(
        np.testing.assert_array_equal, weights.load(tmp_path / "c.safetensors", abstract), kept
    )


def test_a_model_without_a_controlnet_refuses_sketches(finished, command, tmp_path):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "sketch.png")
    flags = [
        f"--model={finished}",
        "--prompt=a circle",
        f"--control={tmp_path / 'sketch.png'}",
        f"--out={tmp_path / 'out'}",
    ]
    result = command("sprint_jax", "sample", *flags)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].count("has no ControlNet") == 1
