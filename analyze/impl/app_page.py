"""The page of analyze/app.py, in Gradio. What it shows is computed in app_views.py."""

import shlex
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


def _settings(update: dict[str, Any]) -> dict[str, Any]:
    """An update of a component as arguments of its constructor."""
    return {name: value for name, value in update.items() if name != "__type__"}


def as_given(command: str, path: str, samples: dict[str, Path]) -> str:
    """A command in which an upload, which lies where nobody put it, has its name alone."""
    if Path(path) in samples.values():
        return command
    return command.replace(shlex.quote(path), shlex.quote(Path(path).name))


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
    opening = take(str(next(iter(samples.values()))))  # what the page shows at once: nobody waits for it
    with gr.Blocks(title="Vision state-space models", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# What does it see?\nChoose an image, then click a pixel: what is the output there made of?")
        path = gr.State(opening[0])
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
                picture = gr.Image(opening[1], label="Click a pixel", height=360, elem_id="picture", **shown)
                with gr.Row():
                    number = {"precision": 0, "minimum": 0, "min_width": 80}
                    x, y = (
                        gr.Number(at, label=n, elem_id=n, **number) for n, at in zip("xy", opening[2:], strict=True)
                    )
        taken = [path, picture, x, y]
        taking = in_page(lambda name: take(str(samples[name])))
        new_image = [
            example.input(taking, example, taken, **_MODELS),
            upload.upload(in_page(take), upload, taken, **_MODELS),
        ]
        new_query = [picture.select(in_page(clicked), path, [x, y]), x.submit(None), y.submit(None)]
        with gr.Row():
            for number, model in enumerate((first, second)):
                column = folder / f"column{number}"
                begin = (model.value, opening[0], *opening[2:])
                _column(number, model, choices, (path, x, y), begin, new_image, new_query, column, samples)
    return page


def _column(
    number: int,
    model: gr.Dropdown,
    choices: dict[str, views.Shown],
    place: tuple[gr.State, gr.Number, gr.Number],
    begin: tuple[str, str, int, int],
    new_image: list,
    new_query: list,
    folder: Path,
    samples: dict[str, Path],
) -> None:
    """What is shown of one model: `place` is the image and the pixel that is asked about, `new_image` and `new_query`
    the events after which they are others, `begin` the model, image and pixel at first."""

    def write(figure: Figure, name: str) -> str:
        """The path of the PNG. Gradio serves a copy of it."""
        out = folder / f"{name}.png"
        save_png(figure, out)
        return str(out)

    def write_all(figure: Figure | None, command: str) -> Any:
        """The paths of PNG, SVG and PDF, and of a script that makes them."""
        if figure is None:
            return gr.skip()
        out = folder / "attnmap.png"
        save_figure(figure, out)  # the PNG again: others may use the page, too
        script = out.with_suffix(".sh")
        script.write_text(f"{command}\n")
        return [str(path) for path in (out, *map(out.with_suffix, VECTOR), script)]

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
        return write(found.figure, "attnmap"), rows, as_given(found.command, path, samples), found.figure

    def classify(label: str, path: str | None) -> tuple:
        if label == _NONE or path is None:
            return (gr.skip(),) * 3
        found = views.answer(choices[label], Path(path))
        return found.shares, write(found.figure, "cam"), as_given(found.command, path, samples)

    def see(label: str, path: str | None) -> tuple:
        if path is None:
            raise gr.Error("choose an image first", title="Not possible")
        figure, command = views.field(choices[label], Path(path))
        command = as_given(command, path, samples)
        return gr.update(value=write(figure, "erf"), visible=True), gr.update(value=command, visible=True)

    def named(name: str) -> dict[str, Any]:
        return {"elem_id": f"{name}{number}"}

    label, *asked_first = begin
    body_set, stage_set, block_set, mode_set = map(_settings, controls(label, 0, None, None))
    first: dict[str, Any] = {}
    if label != _NONE:
        chosen_first = (stage_set["value"], block_set["value"], mode_set["value"])
        png, rows, line, drawn = look(label, *asked_first, *chosen_first)
        shares, cam_png, cam_line = classify(label, asked_first[0])
        first = {"maps": png, "numbers": rows, "command": line, "files": write_all(drawn, line)}
        first |= {"classes": shares, "cam": cam_png, "cam_command": cam_line}
    shown = {"interactive": False, "format": "png", "buttons": ["fullscreen"], "show_label": False}
    code = {"language": "shell", "interactive": False, "lines": 1, "wrap_lines": True}
    with gr.Column(**body_set) as body:
        classes = gr.Label(first.get("classes"), label="Most probable classes", num_top_classes=5, **named("classes"))
        with gr.Row():
            depth = {"minimum": 0, "step": 1, "min_width": 120}
            stage = gr.Slider(label="stage", **depth, **stage_set, **named("stage"))
            block = gr.Slider(label="block", **depth, **block_set, **named("block"))
            mode = gr.Dropdown(label="mode", min_width=120, **mode_set, **named("mode"))
        gr.Markdown("#### What the output at the pixel is made of")
        maps = gr.Image(first.get("maps"), **named("maps"), **shown)
        numbers = gr.Dataframe(
            first.get("numbers"), headers=HEADS, interactive=False, label="Weights", **named("numbers")
        )
        command = gr.Code(first.get("command"), label="The same by command", **named("command"), **code)
        figure = gr.State()
        several = {"file_count": "multiple", "interactive": False, "label": "The figure and its command"}
        files = gr.File(first.get("files"), **several, **named("files"))
        gr.Markdown("#### Where the class is seen (Grad-CAM)")
        cam = gr.Image(first.get("cam"), **named("cam"), **shown)
        cam_command = gr.Code(first.get("cam_command"), show_label=False, **code)
        see_field = gr.Button("Effective receptive field", **named("see_field"))
        field = gr.Image(visible=False, **named("field"), **shown)
        field_command = gr.Code(show_label=False, visible=False, **code)
        measure = gr.Button("Throughput on this machine", **named("measure"))
        speed = gr.Textbox(show_label=False, interactive=False, **named("speed"))

    def fresh(label: str) -> tuple:
        return controls(label, 0, None, None)

    asked = [model, *place, stage, block, mode]
    answers = [maps, numbers, command, figure]
    kept = [figure, command]
    seen = [classes, cam, cam_command]
    chosen = [body, stage, block, mode]
    for event in (model.input(in_page(fresh), model, chosen), *new_image):
        looked = event.then(in_page(look), asked, answers, **_MODELS)
        looked.then(in_page(classify), asked[:2], seen, **_MODELS).then(write_all, kept, files, **_MODELS)
    for event in new_query:
        event.then(in_page(look), asked, answers, **_MODELS).then(write_all, kept, files, **_MODELS)
    for event in (stage.input, block.input, mode.input):
        settled = event(in_page(controls), [model, stage, block, mode], chosen, trigger_mode="always_last")
        looked = settled.then(in_page(look), asked, answers, **_MODELS)
        looked.then(write_all, kept, files, **_MODELS)
    see_field.click(in_page(see), asked[:2], [field, field_command], **_MODELS)
    measure.click(in_page(lambda label: views.speed(choices[label])), model, speed, **_MODELS)
