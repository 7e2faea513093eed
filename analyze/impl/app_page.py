"""The page of analyze/app.py, in Gradio. What it shows is computed in app_views.py."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from matplotlib.figure import Figure

from analyze.figures import VECTOR, save_figure, save_png
from analyze.impl import app_views as views
from ssm_train.common.errors import UserError

MOST_BYTES = 20 * 2**20  # of an upload
_NONE = "none"
_DEPTHS = ("stage", "block")
HEADS = ["route", "smallest", "largest", "at the query"]
_MODELS = {"concurrency_id": "models", "concurrency_limit": 1, "show_progress": "minimal"}  # of all that computes


def launch(page: gr.Blocks, host: str, port: int, **options: Any) -> Any:
    """Serve the page; returns what Gradio does. UserError where the port is taken."""
    bounds = {"max_file_size": MOST_BYTES, "show_error": True, "share": False, "ssr_mode": False, "footer_links": []}
    try:
        return page.launch(server_name=host, server_port=port, run_history=False, **bounds, **options)
    except OSError as error:
        raise UserError(f"--port {port}: {error}") from error


def in_page(work: Callable) -> Callable:
    """Mistakes of the user are shown in the page, in one line."""

    @wraps(work)
    def told(*given: Any) -> Any:
        try:
            return work(*given)
        except UserError as error:
            raise gr.Error(str(error), title="Not possible", print_exception=False) from error

    return told


def build(choices: dict[str, views.Shown], samples: dict[str, Path], folder: Path) -> gr.Blocks:
    """The page for models and images by their labels; the figures that it makes go to `folder`."""

    def take(path: str | None) -> tuple:
        """Of a new image its path, what is shown, and its middle."""
        if path is None:
            return (gr.skip(),) * 4
        shown, (width, height) = views.picture(Path(path))
        return path, shown, width // 2, height // 2

    def clicked(path: str, event: gr.SelectData) -> tuple[int, int]:
        return views.pixel_of(Path(path), event.index)

    labels = list(choices)
    with gr.Blocks(title="Vision state-space models", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# What does it see?\nChoose an image, then click a pixel: what is the output there made of?")
        path = gr.State()
        with gr.Row():
            with gr.Column():
                label = f"An image, up to {MOST_BYTES >> 20} MB"
                upload = gr.File(label=label, file_types=["image"], height=150, elem_id="upload")
                example = gr.Radio(list(samples), value=next(iter(samples)), label="or one of these", elem_id="example")
                with gr.Row():
                    first = gr.Dropdown(labels, value=labels[0], label="Model", elem_id="model0")
                    second = gr.Dropdown([_NONE, *labels], value=_NONE, label="beside it", elem_id="model1")
            with gr.Column():
                shown = {"interactive": False, "format": "png", "buttons": []}
                picture = gr.Image(label="Click a pixel", height=360, elem_id="picture", **shown)
                with gr.Row():
                    x, y = (gr.Number(label=name, precision=0, minimum=0, min_width=80, elem_id=name) for name in "xy")
        taken = [path, picture, x, y]
        taking = in_page(lambda name: take(str(samples[name])))
        new_image = [
            page.load(taking, example, taken, **_MODELS),
            example.input(taking, example, taken, **_MODELS),
            upload.upload(in_page(take), upload, taken, **_MODELS),
        ]
        new_query = [picture.select(in_page(clicked), path, [x, y]), x.submit(None), y.submit(None)]
        with gr.Row():
            for number, model in enumerate((first, second)):
                _column(number, model, choices, (path, x, y), new_image, new_query, folder / f"column{number}")
    return page


def _column(
    number: int,
    model: gr.Dropdown,
    choices: dict[str, views.Shown],
    place: tuple[gr.State, gr.Number, gr.Number],
    new_image: list,
    new_query: list,
    folder: Path,
) -> None:
    """What is shown of one model: `place` is the image and the pixel that is asked about, `new_image` and `new_query`
    the events after which they are others."""

    def write(figure: Figure, name: str) -> str:
        """The path of the PNG. Gradio serves a copy of it."""
        out = folder / f"{name}.png"
        save_png(figure, out)
        return str(out)

    def write_all(figure: Figure | None) -> Any:
        """The paths of PNG, SVG and PDF."""
        if figure is None:
            return gr.skip()
        out = folder / "attnmap.png"
        save_figure(figure, out)
        return [str(out), *(str(out.with_suffix(suffix)) for suffix in VECTOR)]

    def settle(label: str, stage: int, block: int | None, mode: str | None) -> tuple[views.Shown, int, int, str]:
        """The nearest to a stage, block and mode that the model has; the last block where none is given."""
        shown = choices[label]
        stage = min(int(stage), len(shown.stages) - 1)
        last = shown.stages[stage] - 1
        block = last if block is None else min(int(block), last)
        modes = shown.modes(stage, block)
        return shown, stage, block, mode if mode in modes else "CwBdtw" if "CwBdtw" in modes else modes[0]

    def controls(label: str, stage: int, block: int, mode: str | None) -> tuple:
        """What can be chosen of a model."""
        if label == _NONE:
            return gr.update(visible=False), *(gr.skip(),) * 3
        shown, stage, block, mode = settle(label, stage, block, mode)
        blocks = shown.stages[stage]
        return (
            gr.update(visible=True),
            gr.update(maximum=max(len(shown.stages) - 1, 1), value=stage, interactive=len(shown.stages) > 1),
            gr.update(maximum=max(blocks - 1, 1), value=block, interactive=blocks > 1),
            gr.update(choices=list(shown.modes(stage, block)), value=mode),
        )

    def look(label: str, path: str | None, x: int, y: int, stage: int, block: int, mode: str) -> tuple:
        if label == _NONE or path is None:
            return (gr.skip(),) * 4
        shown, stage, block, mode = settle(label, stage, block, mode)
        found = views.attention(shown, Path(path), (int(x), int(y)), stage, block, mode)
        rows = [[route, *(f"{value:.6g}" for value in values)] for route, *values in found.rows]
        return write(found.figure, "attnmap"), rows, found.command, found.figure

    def classify(label: str, path: str | None) -> tuple:
        if label == _NONE or path is None:
            return (gr.skip(),) * 3
        shares = views.classes(choices[label], Path(path))
        figure, command = views.class_map(choices[label], Path(path))
        return shares, write(figure, "cam"), command

    def see(label: str, path: str | None) -> tuple:
        if path is None:
            raise gr.Error("choose an image first", title="Not possible")
        figure, command = views.field(choices[label], Path(path))
        return gr.update(value=write(figure, "erf"), visible=True), gr.update(value=command, visible=True)

    def named(name: str) -> dict[str, Any]:
        return {"elem_id": f"{name}{number}"}

    shown = {"interactive": False, "format": "png", "buttons": ["fullscreen"], "show_label": False}
    code = {"language": "shell", "interactive": False, "lines": 1, "wrap_lines": True}
    with gr.Column(visible=number == 0) as body:
        classes = gr.Label(label="Most probable classes", num_top_classes=5, **named("classes"))
        with gr.Row():
            stage, block = (gr.Slider(0, 3, 0, step=1, label=what, min_width=120, **named(what)) for what in _DEPTHS)
            mode = gr.Dropdown([], label="mode", min_width=120, **named("mode"))
        gr.Markdown("#### What the output at the pixel is made of")
        maps = gr.Image(**named("maps"), **shown)
        numbers = gr.Dataframe(headers=HEADS, interactive=False, label="Weights", **named("numbers"))
        command = gr.Code(label="The same by command", **named("command"), **code)
        figure = gr.State()
        files = gr.File(label="The figure", interactive=False, file_count="multiple", **named("files"))
        gr.Markdown("#### Where the class is seen (Grad-CAM)")
        cam = gr.Image(**named("cam"), **shown)
        cam_command = gr.Code(show_label=False, **code)
        see_field = gr.Button("Effective receptive field", **named("see_field"))
        field = gr.Image(visible=False, **named("field"), **shown)
        field_command = gr.Code(show_label=False, visible=False, **code)
        measure = gr.Button("Throughput on this machine", **named("measure"))
        speed = gr.Textbox(show_label=False, interactive=False, **named("speed"))

    def fresh(label: str) -> tuple:
        return controls(label, 0, None, None)

    asked = [model, *place, stage, block, mode]
    answers = [maps, numbers, command, figure]
    seen = [classes, cam, cam_command]
    chosen = [body, stage, block, mode]
    opened, *others = new_image
    for event in (opened.then(in_page(fresh), model, chosen), model.input(in_page(fresh), model, chosen), *others):
        looked = event.then(in_page(look), asked, answers, **_MODELS)
        looked.then(in_page(classify), asked[:2], seen, **_MODELS).then(write_all, figure, files, **_MODELS)
    for event in new_query:
        event.then(in_page(look), asked, answers, **_MODELS).then(write_all, figure, files, **_MODELS)
    for event in (stage.input, block.input, mode.input):
        settled = event(in_page(controls), [model, stage, block, mode], chosen, trigger_mode="always_last")
        looked = settled.then(in_page(look), asked, answers, **_MODELS)
        looked.then(write_all, figure, files, **_MODELS)
    see_field.click(in_page(see), asked[:2], [field, field_command], **_MODELS)
    measure.click(in_page(lambda label: views.speed(choices[label])), model, speed, **_MODELS)
