"""The page: Gradio's controls around our own picture, drop zone and canvas (`page.js`, `page.css`).

Every drawing, from any tab, is one POST /generate made by the browser. So the page has the API's limits, order and
errors, nothing is stored on the server, and Gradio only hands out its own scripts (`api.Guard` sees to that): it has
no event that reaches Python, no upload, no file. All of it works without a network.
"""

import json
import pathlib

from sprint_jax.serving import requests, uploads

_HERE = pathlib.Path(__file__).parent
_EXAMPLES = 5


def mount(app, limits: requests.Limits, name: str, examples: list[str]):
    """Adds the page to the API's application, at /.

    name: of the model, shown at the top. examples: prompts that a click fills in; the first is there at the start.
    """
    import gradio

    head = f"<style>{(_HERE / 'page.css').read_text()}</style><script>{_offer(limits)}\n{(_HERE / 'page.js').read_text()}</script>"
    return gradio.mount_gradio_app(
        app,
        _blocks(gradio, limits, name, examples[:_EXAMPLES]),
        "/",
        head=head,
        theme=_theme(gradio),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        allowed_paths=[],
    )


def _offer(limits):
    """The line of JavaScript that says what the server takes."""
    offer = dict(
        height=limits.sizes[0][0],
        width=limits.sizes[0][1],
        strength=requests.STRENGTH,
        starts=limits.starts,
        control=limits.control,
        mostBytes=uploads.MOST_BYTES,
        formats=["image/png", "image/jpeg", "image/webp"],
    )
    return f"window.SPRINT_OFFER = {json.dumps(offer)};"


def _theme(gradio):
    """Fonts of the system, so that none is fetched."""
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gradio.themes.Base(primary_hue="indigo", neutral_hue="slate", radius_size="md", **fonts)


def _blocks(gradio, limits, name, examples):
    """The layout. Events run in the browser only (fn=None) and hand values to `page.js`."""
    with gradio.Blocks(title="sprint_jax", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML(
            f'<h1>sprint_jax <span id="sprint-model">{_escaped(name)}</span></h1><div id="sprint-ready" role="status"></div>'
        )
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=5, min_width=340):
                prompt = gradio.Textbox(
                    value=examples[0],
                    label="Prompt",
                    lines=1,
                    max_lines=6,
                    elem_id="sprint-prompt",
                    placeholder="What to draw",
                )
                gradio.HTML(
                    _chips(examples),
                    elem_id="sprint-examples",
                    js_on_load="sprint.examples(element)",
                )
                controls = [prompt, *_tabs(gradio, limits)]
                controls += _settings(gradio, limits)
            with gradio.Column(scale=6, min_width=340):
                gradio.HTML("", elem_id="sprint-view", js_on_load="sprint.view(element)")
        gradio.on(
            [blocks.load, *(control.change for control in controls)],
            fn=None,
            inputs=controls,
            js="(...values) => { sprint.settings(...values); }",
            show_progress="hidden",
        )
        prompt.submit(fn=None, js="() => { sprint.draw(); }")
    return blocks


def _chips(examples):
    return (
        '<div class="sprint-chips">'
        + "".join(f"<button>{_escaped(text)}</button>" for text in examples)
        + "</div>"
    )


def _tabs(gradio, limits):
    """Three ways to ask. Returns the sliders of strength for the picture and the drawing."""
    strength = lambda elem_id: gradio.Slider(
        0.05,
        1,
        value=requests.STRENGTH,
        step=0.05,
        label="Strength: how much of it may change",
        elem_id=elem_id,
    )
    with gradio.Tabs(elem_id="sprint-tabs"):
        with gradio.Tab("Text", render_children=True) as text:
            _draw_button(gradio, "sprint-draw-text")
        with gradio.Tab("Picture", render_children=True, visible=limits.starts) as picture:
            gradio.HTML("", elem_id="sprint-drop", js_on_load="sprint.dropZone(element)")
            picture_strength = strength("sprint-strength")
            _draw_button(gradio, "sprint-draw-picture")
        with gradio.Tab(
            "Sketch", render_children=True, visible=limits.starts or limits.control
        ) as sketch:
            gradio.HTML("", elem_id="sprint-sketch", js_on_load="sprint.sketch(element)")
            # With a ControlNet the lines guide the drawing; without one it starts from them.
            sketch_strength = (
                gradio.Slider(
                    0,
                    2,
                    value=1,
                    step=0.05,
                    label="Control: how closely the lines are followed",
                    elem_id="sprint-sketch-strength",
                )
                if limits.control
                else strength("sprint-sketch-strength")
            )
    for tab, mode in ((text, "text"), (picture, "picture"), (sketch, "sketch")):
        tab.select(fn=None, js=f"() => {{ sprint.mode('{mode}'); }}")
    return picture_strength, sketch_strength


def _draw_button(gradio, elem_id):
    button = gradio.Button("Draw", variant="primary", elem_id=elem_id)
    button.click(fn=None, js="() => { sprint.draw(); }")


def _settings(gradio, limits):
    """Steps, guidance, seed, size, schedule."""
    sizes = [f"{height} × {width}" for height, width in limits.sizes]
    with gradio.Group():
        with gradio.Row():
            steps = gradio.Radio(
                list(limits.steps),
                value=limits.usual_steps,
                label="Steps",
                elem_id="sprint-steps",
                min_width=240,
            )
            guidance = gradio.Slider(
                0, 10, value=limits.guidance_scale, step=0.1, label="Guidance", min_width=180
            )
        with gradio.Row():
            seed = gradio.Number(
                value=0, precision=0, label="Seed", elem_id="sprint-seed", min_width=110
            )
            size = gradio.Dropdown(sizes, value=sizes[0], label="Height × width", min_width=110)
            schedule = gradio.Dropdown(
                list(requests.SCHEDULES), value=limits.schedule, label="Schedule", min_width=110
            )
    again = gradio.Button("New seed", size="sm", elem_id="sprint-new-seed")
    again.click(fn=None, outputs=seed, js="() => sprint.newSeed()")
    return steps, guidance, seed, size, schedule


def _escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
